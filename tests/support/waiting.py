"""Waiting for what comes about by itself."""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 300.0
LOOK_SECONDS = 0.02


def until(true: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not in {seconds:.0f} s"
        time.sleep(LOOK_SECONDS)
