"""Waits for a condition to become true."""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 300.0
POLL_SECONDS = 0.02


def until(condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition was not met within {seconds:.0f} s"
        time.sleep(POLL_SECONDS)
