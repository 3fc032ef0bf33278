"""How long an engine's turns take."""

import time


class Turns:
    """Written by the engine's thread, read by any."""

    def __init__(self) -> None:
        self.longest_seconds = 0.0
        self._began: float | None = None

    @property
    def stalled_seconds(self) -> float:
        """How long it has been at one and the same turn; 0 while there is nothing to do."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def begin(self) -> None:
        self._began = time.monotonic()

    def forget(self) -> None:
        """Nobody waits for the turn any more; how long it would have taken is not known."""
        self._began = None

    def end(self) -> None:
        taken = self.stalled_seconds
        self._began = None
        self.longest_seconds = max(self.longest_seconds, taken)
