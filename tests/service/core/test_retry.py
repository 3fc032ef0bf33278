"""Which failures a stage gets another attempt for, and how long it waits."""

import pytest

from service.core.errors import Diverged, Stopped, Unavailable, WorkerLost
from service.core.executor import RunError
from service.core.retry import LONGEST_WAIT_SECONDS, Retry, after_failure, wait_before


def error(code: str, retryable: bool = True) -> RunError:
    return RunError("s", code, "because", retryable)


def test_waits_double_up_to_two_minutes() -> None:
    assert [wait_before(attempt) for attempt in (2, 3, 4)] == [2.0, 4.0, 8.0]
    assert wait_before(50) == LONGEST_WAIT_SECONDS


def test_an_ordinary_failure_counts_until_no_attempt_is_left() -> None:
    lost = error(WorkerLost.code)
    assert after_failure(1, 3, lost, advanced=False) == Retry(2.0, 3)
    assert after_failure(3, 3, lost, advanced=False) == Retry(None, 3)


def test_what_is_never_retried_fails_at_once() -> None:
    assert after_failure(1, 3, error(Diverged.code, False), advanced=False) == Retry(None, 3)
    assert after_failure(1, 3, error(Diverged.code, False), advanced=True).wait_seconds is None


@pytest.mark.parametrize(("code", "wait"), [(Unavailable.code, 8.0), (Stopped.code, 0.0)])
def test_a_failure_that_is_not_the_stages_own_does_not_count(code: str, wait: float) -> None:
    assert after_failure(3, 3, error(code), advanced=False) == Retry(wait, 4)


def test_an_attempt_that_left_a_checkpoint_does_not_count_and_waits_least() -> None:
    assert after_failure(3, 3, error(WorkerLost.code), advanced=True) == Retry(2.0, 4)
