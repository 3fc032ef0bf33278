"""Admits sequences to an engine, and tells rejected requests when to retry."""

import threading
import time
from collections import deque

from workers.serving.engine.port import QueueFull

NUM_RECENT_ENDS = 64
NUM_RECENT_DECISIONS = 64
MAX_QUEUED_SECONDS = 5.0  # for the queue of retries, because some clients never return


class AdmissionQueue:
    """Counts the sequences in flight: ``num_slots`` of them run, the rest wait. Thread-safe."""

    def __init__(self, num_slots: int, max_waiting: int) -> None:
        self._num_slots = num_slots
        self._max_waiting = max_waiting
        self._num_in_flight = 0
        self._busy_since = 0.0  # while sequences are in flight
        self._busy_seconds = 0.0  # before that
        self._ends: deque[float] = deque(maxlen=NUM_RECENT_ENDS)  # busy seconds when sequences ended
        self._decisions: deque[bool] = deque(maxlen=NUM_RECENT_DECISIONS)  # whether requests were admitted
        self._next_retry = 0.0  # when the client that was rejected last should retry
        self._lock = threading.Lock()

    @property
    def num_running(self) -> int:
        return min(self._num_in_flight, self._num_slots)

    @property
    def num_waiting(self) -> int:
        return max(self._num_in_flight - self._num_slots, 0)

    def check_room(self) -> None:
        """Raise QueueFull if ``admit`` would."""
        with self._lock:
            self._check_room()

    def admit(self, num_sequences: int) -> None:
        """Admit all sequences of a request, each of which must ``end``. Raises QueueFull.

        Only the sequences that already wait count: a request with many sequences waits no longer than one
        with few.
        """
        with self._lock:
            self._check_room()
            self._decisions.append(True)
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
        # Sequences that a free slot takes at the next step do not count as waiting.
        num_waiting = self._num_in_flight - self._num_slots
        if num_waiting >= self._max_waiting:
            self._decisions.append(False)
            raise QueueFull(f"{num_waiting} sequences are waiting", self._retry_seconds(num_waiting))

    def _retry_seconds(self, num_waiting: int) -> float:
        """Seconds until a retry should succeed; 1 if no sequence has ended yet.

        By then half of the waiting sequences will have ended, and the clients rejected earlier will have been
        served, if sequences end and requests are admitted at the recent rates. A wasted retry costs about as
        much as an answer.
        """
        if not self._ends:
            return 1.0
        now = time.monotonic()
        busy_seconds = self._busy_seconds + now - self._busy_since
        seconds_per_end = (busy_seconds - self._ends[0]) / len(self._ends)
        earliest = now + num_waiting / 2 * seconds_per_end
        seconds_per_retry = seconds_per_end * len(self._decisions) / max(sum(self._decisions), 1)
        queued = min(self._next_retry + seconds_per_retry, now + MAX_QUEUED_SECONDS)
        self._next_retry = max(earliest, queued)
        return self._next_retry - now


class AdmittedRequest:
    """The admitted sequences of one request that have not ended."""

    def __init__(self, queue: AdmissionQueue, num_sequences: int) -> None:
        """Admit the sequences. Raises QueueFull."""
        queue.admit(num_sequences)
        self._queue = queue
        self._num_open = num_sequences
        self._lock = threading.Lock()

    def end(self, num_sequences: int) -> None:
        """End sequences, at most those that are still open."""
        with self._lock:
            num_ended = min(num_sequences, self._num_open)
            self._num_open -= num_ended
        if num_ended:
            self._queue.end(num_ended)

    def withdraw(self) -> None:
        """End all open sequences."""
        self.end(self._num_open)
