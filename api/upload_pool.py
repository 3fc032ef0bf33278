"""Limits how many uploads are received at once: each takes memory while it lasts, whatever its size."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from service.core.errors import Unavailable

MAX_WAITING = 256
MAX_WAIT_SECONDS = 300.0


class UploadPool:
    """Slots for concurrent uploads, and the threads that work on the uploads that have a slot.

    Further uploads wait unread, first come, first served. Beyond ``max_waiting`` they are rejected.
    """

    def __init__(
        self,
        name: str,
        *,
        slots: int,
        threads: int,
        max_waiting: int = MAX_WAITING,
        max_wait_seconds: float = MAX_WAIT_SECONDS,
    ) -> None:
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._slots = asyncio.Semaphore(slots)
        self._max_waiting = max_waiting
        self._max_wait_seconds = max_wait_seconds
        self._num_waiting = 0

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold a slot for the block. Raises Unavailable if too many uploads wait, or for too long."""
        if self._slots.locked():
            await self._wait()
        else:
            await self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release()

    def close(self) -> None:
        """Wait until the threads have ended."""
        self.threads.shutdown()

    async def _wait(self) -> None:
        if self._num_waiting >= self._max_waiting:
            raise Unavailable(f"{self._num_waiting} uploads are waiting already; try again")
        self._num_waiting += 1
        try:
            await asyncio.wait_for(self._slots.acquire(), self._max_wait_seconds)
        except TimeoutError:
            raise Unavailable(
                f"no upload slot became free within {self._max_wait_seconds:g} seconds; try again"
            ) from None
        finally:
            self._num_waiting -= 1
