"""Between an engine's thread and the event loop that passes its words on: wakes the loop seldom, and keeps the times."""

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from service.core.traffic import Histogram
from workers.serving.engine.port import EngineEvent, SequenceFailed
from workers.serving.generation import Finished, Token


class Outbox:
    """What an engine has emitted for one request of ``num_sequences`` and nobody has fetched yet.

    Of a request that wants its answer ``whole``, the loop hears when all of it is there: at every turn of the engine it
    would cost both of them more than the turn. Made in the loop; ``put`` and ``fail`` are called from any thread.
    """

    def __init__(self, num_sequences: int, *, whole: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._whole = whole
        self._unfinished = num_sequences
        self._events: list[EngineEvent] = []
        self._lock = threading.Lock()
        self._awaited = False  # whether whoever fetches waits for anything at all
        self._some = asyncio.Event()
        self._all = asyncio.Event()
        self._began = time.monotonic()
        self._first: dict[int, float] = {}
        self.first_token = Histogram()
        self.per_token = Histogram()

    def put(self, events: Sequence[EngineEvent]) -> None:
        now = time.monotonic()
        with self._lock:
            over = False
            self._events += events
            for event in events:
                if isinstance(event, Token):
                    if event.index not in self._first:
                        self._first[event.index] = now
                elif isinstance(event, Finished):
                    self._finish(event, now)
                    over = over or self._unfinished == 0
                else:
                    over = True
            awaited, self._awaited = self._awaited, False
        if over or awaited:
            with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._tell, over)

    def fail(self, message: str) -> None:
        """The engine will emit nothing more."""
        self.put([SequenceFailed(0, message)])

    async def fetch(self, not_before: float) -> list[EngineEvent]:
        """What there is, once there is something: at ``not_before`` of the loop's time, sooner if that is all of it."""
        if self._whole:
            await self._all.wait()
        elif (left := not_before - self._loop.time()) > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._all.wait()
        with self._lock:
            awaited = self._awaited = not self._events
        if awaited:
            await self._some.wait()
        with self._lock:
            events, self._events = self._events, []
        if not self._all.is_set():
            self._some.clear()
        return events

    def _finish(self, event: Finished, now: float) -> None:
        self._unfinished -= 1
        first = self._first.get(event.index, now)
        if self.first_token.count == 0:
            self.first_token = self.first_token.observed(min(self._first.values(), default=now) - self._began)
        if event.num_tokens > 1:
            self.per_token = self.per_token.observed((now - first) / (event.num_tokens - 1))

    def _tell(self, over: bool) -> None:
        self._some.set()
        if over:
            self._all.set()
