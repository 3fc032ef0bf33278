"""How many sequences an engine takes on, who is refused, and when those are to come back."""

import threading
import time
from collections import deque

from workers.serving.engine.port import QueueFull

REMEMBERED_ENDS = 64
REMEMBERED_DECISIONS = 64
MAX_QUEUED_SECONDS = 5.0  # of those who are told to come back: some never do


class Admission:
    """Counts the sequences in flight: ``num_slots`` of them run, and what is more waits. From any thread."""

    def __init__(self, num_slots: int, max_waiting: int) -> None:
        self._num_slots = num_slots
        self._max_waiting = max_waiting
        self._num_in_flight = 0
        self._busy_since = 0.0  # while some are in flight
        self._busy_seconds = 0.0  # before that
        # How long it had been busy when sequences ended.
        self._ends: deque[float] = deque(maxlen=REMEMBERED_ENDS)
        self._taken: deque[bool] = deque(maxlen=REMEMBERED_DECISIONS)  # whether those who asked last were
        self._next_return = 0.0  # when the last one that was refused comes back
        self._lock = threading.Lock()

    @property
    def num_running(self) -> int:
        return min(self._num_in_flight, self._num_slots)

    @property
    def num_waiting(self) -> int:
        return max(self._num_in_flight - self._num_slots, 0)

    def check_room(self) -> None:
        """Raises QueueFull where ``admit`` would."""
        with self._lock:
            self._check_room()

    def admit(self, num_sequences: int) -> None:
        """All sequences of a request, each of which is to be ended. Raises QueueFull.

        What stands before them counts, not their own number: a request of many sequences is no more to wait for.
        """
        with self._lock:
            self._check_room()
            self._taken.append(True)
            if self._num_in_flight == 0:
                self._busy_since = time.monotonic()
            self._num_in_flight += num_sequences

    def end(self, num_sequences: int = 1) -> None:
        with self._lock:
            busy_seconds = self._busy_seconds + time.monotonic() - self._busy_since
            self._num_in_flight -= num_sequences
            self._ends.extend([busy_seconds] * num_sequences)
            if self._num_in_flight == 0:
                self._busy_seconds = busy_seconds

    def _check_room(self) -> None:
        # What a free slot takes at the next turn waits for nobody.
        num_waiting = self._num_in_flight - self._num_slots
        if num_waiting >= self._max_waiting:
            self._taken.append(False)
            raise QueueFull(f"{num_waiting} sequences are waiting", self._retry_seconds(num_waiting))

    def _retry_seconds(self, num_waiting: int) -> float:
        """When half of those that wait will have ended, and room will have been for everybody who was told so before, if they go
        on ending as the last ones did, and others who ask are taken as often as the last ones were: each who comes back in vain
        costs about as much as an answer. 1 where none has ended.
        """
        if not self._ends:
            return 1.0
        now = time.monotonic()
        busy_seconds = self._busy_seconds + now - self._busy_since
        seconds_each = (busy_seconds - self._ends[0]) / len(self._ends)
        soonest = now + num_waiting / 2 * seconds_each
        seconds_a_return = seconds_each * len(self._taken) / max(sum(self._taken), 1)
        queued = min(self._next_return + seconds_a_return, now + MAX_QUEUED_SECONDS)
        self._next_return = max(soonest, queued)
        return self._next_return - now


class Admitted:
    """The sequences of one request that were admitted and have not ended."""

    def __init__(self, admission: Admission, num_sequences: int) -> None:
        """Raises QueueFull."""
        admission.admit(num_sequences)
        self._admission = admission
        self._num_left = num_sequences
        self._lock = threading.Lock()

    def end(self, num_sequences: int) -> None:
        """So many of them have, if they were still there."""
        with self._lock:
            num_ended = min(num_sequences, self._num_left)
            self._num_left -= num_ended
        if num_ended:
            self._admission.end(num_ended)

    def withdraw(self) -> None:
        """All that are left."""
        self.end(self._num_left)
