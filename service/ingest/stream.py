"""Feeds a body from the event loop into the sink: on a worker thread, in bounded memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import TypeVar

from service.ingest.ingest import Body, Ingest

# Handing work to a thread costs about 100 µs; 256 KiB of ndjson keep the thread busy for about 3 ms.
_BATCH_BYTES = 1 << 18

_T = TypeVar("_T")


async def in_worker(function: Callable[[], _T], executor: Executor | None = None) -> _T:
    """Run ``function`` on a worker thread and wait until it ends, even if this task is cancelled.

    The caller can close what the function works on afterwards, because no thread still uses it.
    """
    return await _wait_to_end(asyncio.get_running_loop().run_in_executor(executor, function))


async def receive(chunks: AsyncIterator[bytes], ingest: Ingest, executor: Executor | None = None) -> Body:
    """Feed all chunks to ``ingest`` and end it. Raises BadContent as soon as the body is known to be bad.

    Gathers one batch while the thread works on the one before, so at most two batches of 256 KiB and the
    excess of one chunk are in memory. If ``chunks`` raises, waits for the thread before passing the
    exception on.
    """
    loop = asyncio.get_running_loop()
    feeding: asyncio.Future[None] | None = None
    batch: list[bytes] = []
    batch_bytes = 0
    try:
        async for chunk in chunks:
            batch.append(chunk)
            batch_bytes += len(chunk)
            if batch_bytes >= _BATCH_BYTES:
                if feeding is not None:
                    await _wait_to_end(feeding)
                feeding = loop.run_in_executor(executor, ingest.feed, b"".join(batch))
                batch, batch_bytes = [], 0
    except BaseException:
        if feeding is not None:
            await asyncio.gather(_wait_to_end(feeding), return_exceptions=True)
        raise
    if feeding is not None:
        await _wait_to_end(feeding)

    def end() -> Body:
        ingest.feed(b"".join(batch))
        return ingest.end()

    return await in_worker(end, executor)


async def _wait_to_end(future: asyncio.Future[_T]) -> _T:
    """Wait for a future that cannot be cancelled; then raise CancelledError if this task was."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()  # or asyncio logs that the exception was never retrieved
        raise cancelled
    return future.result()
