"""From an event loop into the sink: on a worker thread, with a bounded amount of body in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from contextvars import copy_context
from typing import TypeVar

from service.ingest.ingest import Body, Ingest

# A hop to a thread costs about 100 µs, and 256 KiB of ndjson keep that thread busy for about 3 ms.
_BATCH_BYTES = 1 << 18

_T = TypeVar("_T")


async def in_worker(function: Callable[[], _T], executor: Executor | None = None) -> _T:
    """Run ``function`` on a worker thread and wait for its end, also where this task is cancelled meanwhile.

    It runs in this task's context. What it works on can be closed afterwards, because no thread is still at it.
    """
    context = copy_context()
    return await _settled(asyncio.get_running_loop().run_in_executor(executor, context.run, function))


async def receive(chunks: AsyncIterator[bytes], ingest: Ingest, executor: Executor | None = None) -> Body:
    """Feed all chunks to ``ingest`` and end it. Raises BadContent as soon as the body is known to be bad.

    While one batch is worked on the next is gathered, and no more is asked of ``chunks`` than that: two
    batches of 256 KiB, and what one chunk has more, are in memory at any time. An exception of ``chunks`` is
    passed on when the thread has come to rest.
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
                    await _settled(feeding)
                feeding = loop.run_in_executor(executor, ingest.feed, b"".join(batch))
                batch, batch_bytes = [], 0
    except BaseException:
        if feeding is not None:
            await asyncio.gather(_settled(feeding), return_exceptions=True)
        raise
    if feeding is not None:
        await _settled(feeding)

    def last() -> Body:
        ingest.feed(b"".join(batch))
        return ingest.end()

    return await in_worker(last, executor)


async def _settled(future: asyncio.Future[_T]) -> _T:
    """Wait for a future that cannot be cancelled. Raises CancelledError afterwards where this task was."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()  # seen, so that nobody is told that it was not
        raise cancelled
    return future.result()
