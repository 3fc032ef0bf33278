"""How long an engine's turns take, and from that when sequences that wait will have their turn."""

import time
from collections import deque

REMEMBERED_ENDS = 64
MAX_QUEUED_SECONDS = 5.0  # of those who are told to come back: some never do


class Turns:
    """Written by the engine's thread, read by any."""

    def __init__(self) -> None:
        self.longest_seconds = 0.0
        self._began: float | None = None
        self._busy_seconds = 0.0
        # How long it had been busy when sequences ended.
        self._ends: deque[float] = deque(maxlen=REMEMBERED_ENDS)
        self._next_return = 0.0  # when the last one that was refused comes back

    @property
    def stalled_seconds(self) -> float:
        """How long it has been at one and the same turn; 0 while there is nothing to do."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def begin(self) -> None:
        self._began = time.monotonic()

    def end(self) -> None:
        taken = self.stalled_seconds
        self._began = None
        self._busy_seconds += taken
        self.longest_seconds = max(self.longest_seconds, taken)

    def sequence_ended(self) -> None:
        self._ends.append(self._busy_seconds)

    def retry_seconds(self, num_waiting: int) -> float:
        """When to come back for one that is refused while so many sequences wait: when half of them will have ended, and one
        more for everybody who was told so before, if they go on ending as the last ones did. 1 where none has.
        """
        if not self._ends:
            return 1.0
        seconds_each = (self._busy_seconds - self._ends[0]) / len(self._ends)
        now = time.monotonic()
        soonest = now + num_waiting / 2 * seconds_each
        queued = min(self._next_return + seconds_each, now + MAX_QUEUED_SECONDS)
        self._next_return = max(soonest, queued)
        return self._next_return - now
