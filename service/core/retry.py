"""Whether a failed stage gets another attempt, and how long to wait before it."""

from dataclasses import dataclass

from service.core.errors import Stopped, Unavailable
from service.core.executor import RunError

MAX_ATTEMPTS = 4
FIRST_WAIT_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 120.0


@dataclass(frozen=True)
class Retry:
    """What follows a failed attempt. ``wait_seconds`` is None if there is no further attempt."""

    wait_seconds: float | None
    max_attempts: int


def after_failure(attempt: int, max_attempts: int, error: RunError, *, advanced: bool) -> Retry:
    """Decide what follows the failure of attempt number ``attempt`` (1, 2, …) out of ``max_attempts``.

    Two kinds of failure do not count, and raise ``max_attempts`` by one: those that are not the stage's fault
    (a full disk, an unavailable store, a stopped process), and those of an attempt that ``advanced``, i.e. left
    a checkpoint from which the next attempt continues.
    """
    max_attempts += advanced or error.code in (Unavailable.code, Stopped.code)
    if not worth_another(attempt, max_attempts, error.retryable):
        return Retry(None, max_attempts)
    if error.code == Stopped.code:
        return Retry(0.0, max_attempts)
    return Retry(wait_before(2 if advanced else attempt + 1), max_attempts)


def wait_before(attempt: int) -> float:
    """Seconds to wait before ``attempt`` (2, 3, …): doubling from two seconds, at most two minutes."""
    return min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** max(0, attempt - 2))


def worth_another(attempt: int, max_attempts: int, retryable: bool) -> bool:
    """Whether a stage that failed on ``attempt`` gets another one."""
    return retryable and attempt < max_attempts
