"""Measures how long an engine's steps take."""

import time


class StepClock:
    """Times one step after another. The engine's thread writes it; any thread may read it."""

    def __init__(self) -> None:
        self.longest_seconds = 0.0
        self._started: float | None = None

    @property
    def stalled_seconds(self) -> float:
        """Age of the current step; 0 while the engine is idle."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started

    def start(self) -> None:
        self._started = time.monotonic()

    def cancel(self) -> None:
        """Drop the current step without recording its duration, because nothing waits for it any more."""
        self._started = None

    def stop(self) -> None:
        seconds = self.stalled_seconds
        self._started = None
        self.longest_seconds = max(self.longest_seconds, seconds)
