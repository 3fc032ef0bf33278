"""Carries an engine's output from its thread to the event loop, with few wake-ups, and measures latencies."""

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from service.core.traffic import Histogram
from workers.serving.engine.port import EngineEvent, SequenceFailed
from workers.serving.generation import Finished, Token


class OutputQueue:
    """Engine events of one request of ``num_sequences`` that have not been read yet.

    With ``whole``, the event loop is woken only once, when the answer is complete: waking it at every engine
    step would cost both threads more than the step. Create it on the event loop; call ``put`` and ``fail``
    from any thread.
    """

    def __init__(self, num_sequences: int, *, whole: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._whole = whole
        self._unfinished = num_sequences
        self._events: list[EngineEvent] = []
        self._lock = threading.Lock()
        self._reader_waits = False  # the reader found nothing and wants to be woken by the next event
        self._not_empty = asyncio.Event()
        self._complete = asyncio.Event()
        self._started_at = time.monotonic()
        self._first_token_at: dict[int, float] = {}
        self.first_token = Histogram()
        self.per_token = Histogram()

    def put(self, events: Sequence[EngineEvent]) -> None:
        now = time.monotonic()
        with self._lock:
            complete = False
            self._events += events
            for event in events:
                if isinstance(event, Token):
                    if event.index not in self._first_token_at:
                        self._first_token_at[event.index] = now
                elif isinstance(event, Finished):
                    self._finish(event, now)
                    complete = complete or self._unfinished == 0
                else:
                    complete = True
            reader_waits, self._reader_waits = self._reader_waits, False
        if complete or reader_waits:
            with suppress(RuntimeError):  # the loop is closed, and its readers with it
                self._loop.call_soon_threadsafe(self._wake, complete)

    def fail(self, message: str) -> None:
        """End the output: the engine will emit nothing more."""
        self.put([SequenceFailed(0, message)])

    async def get(self, not_before: float) -> list[EngineEvent]:
        """Return the unread events, at least one, at ``not_before`` (loop time); the last ones at once."""
        if self._whole:
            await self._complete.wait()
        elif (seconds := not_before - self._loop.time()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._complete.wait()
        with self._lock:
            reader_waits = self._reader_waits = not self._events
        if reader_waits:
            await self._not_empty.wait()
        with self._lock:
            events, self._events = self._events, []
        if not self._complete.is_set():
            self._not_empty.clear()
        return events

    def _finish(self, event: Finished, now: float) -> None:
        self._unfinished -= 1
        first = self._first_token_at.get(event.index, now)
        if self.first_token.count == 0:
            earliest = min(self._first_token_at.values(), default=now)
            self.first_token = self.first_token.observed(earliest - self._started_at)
        if event.num_tokens > 1:
            self.per_token = self.per_token.observed((now - first) / (event.num_tokens - 1))

    def _wake(self, complete: bool) -> None:
        self._not_empty.set()
        if complete:
            self._complete.set()
