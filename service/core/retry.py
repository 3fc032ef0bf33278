"""When a failed stage is worth another attempt, and how long it waits for it."""

MAX_ATTEMPTS = 4
FIRST_WAIT_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 120.0


def wait_before(attempt: int) -> float:
    """Seconds before ``attempt`` (2, 3, …): doubling from two seconds, at most two minutes."""
    return min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** max(0, attempt - 2))


def worth_another(attempt: int, max_attempts: int, retryable: bool) -> bool:
    """Whether a stage that failed in its ``attempt``-th try gets one more."""
    return retryable and attempt < max_attempts
