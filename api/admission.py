"""How many uploads are taken in at once, and worked on: each takes memory while it lasts, however large its body is."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from service.core.errors import Unavailable

MAX_WAITING = 256
MAX_WAIT_SECONDS = 300.0


class Lane:
    """Turns to come in, and the threads on which those who have one are worked on."""

    def __init__(self, name: str, *, at_once: int, threads: int) -> None:
        self._admission = Admission(at_once, MAX_WAITING, MAX_WAIT_SECONDS)
        self.turn = self._admission.turn
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def close(self) -> None:
        self.threads.shutdown()


class Admission:
    """So many at once; some more wait, unread, and come in the order in which they came; all others are refused."""

    def __init__(self, at_once: int, max_waiting: int, max_wait_seconds: float) -> None:
        self._turns = asyncio.Semaphore(at_once)
        self._max_waiting = max_waiting
        self._max_wait_seconds = max_wait_seconds
        self._waiting = 0

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Raises Unavailable where too many wait already, or no turn has come in time."""
        if self._turns.locked():
            await self._wait()
        else:
            await self._turns.acquire()
        try:
            yield
        finally:
            self._turns.release()

    async def _wait(self) -> None:
        if self._waiting >= self._max_waiting:
            raise Unavailable(f"{self._waiting} uploads wait for their turn at this moment")
        self._waiting += 1
        try:
            await asyncio.wait_for(self._turns.acquire(), self._max_wait_seconds)
        except TimeoutError:
            raise Unavailable(f"other uploads took longer than {self._max_wait_seconds:g} seconds") from None
        finally:
            self._waiting -= 1
