"""Feeding an async stream into the sink: backpressure, a free event loop, no thread left running."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.artifacts import Artifacts, LocalArtifacts
from service.core.errors import BadContent
from service.ingest.ingest import Body, Ingest
from service.ingest.stream import in_worker, receive
from tests.service.ingest.support import NDJSON, in_chunks, ndjson

CHUNK = ndjson("x" * 1000) * 64


async def chunks_of(body: bytes, size: int = 1 << 16) -> AsyncIterator[bytes]:
    for chunk in in_chunks(body, size):
        yield chunk


class SlowIngest(Ingest):
    """A slow sink that records its threads and how many bytes it was fed."""

    def __init__(self, artifacts: Artifacts) -> None:
        super().__init__(artifacts, NDJSON)
        self.threads: set[int] = set()
        self.fed_bytes = 0
        self.busy = False

    def feed(self, chunk: bytes) -> None:
        assert not self.busy
        self.busy = True
        self.threads.add(threading.get_ident())
        time.sleep(0.05)
        super().feed(chunk)
        self.fed_bytes += len(chunk)
        self.busy = False


@pytest.mark.parametrize("size", [1, 1000, 1 << 16, 3 << 20])
def test_a_stream_is_received_completely(tmp_path: Path, size: int) -> None:
    body = ndjson(*(f"{number} " + "x" * 2000 for number in range(1500 if size > 1 else 3)))

    async def run(ingest: Ingest) -> Body:
        return await receive(chunks_of(body, size), ingest)

    with Ingest(LocalArtifacts(tmp_path / "a"), NDJSON) as ingest:
        received = asyncio.run(run(ingest))
    with Ingest(LocalArtifacts(tmp_path / "b"), NDJSON) as ingest:
        ingest.feed(body)
        assert received == ingest.end()


def test_the_stream_is_read_only_as_fast_as_the_sink_accepts_it(tmp_path: Path) -> None:
    async def run(ingest: SlowIngest) -> int:
        max_ahead = requested = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal max_ahead, requested
            for _ in range(160):
                requested += len(CHUNK)
                max_ahead = max(max_ahead, requested - ingest.fed_bytes)
                yield CHUNK

        await receive(counted(), ingest)
        return max_ahead

    with SlowIngest(LocalArtifacts(tmp_path)) as ingest:
        max_ahead = asyncio.run(run(ingest))
        assert ingest.fed_bytes == 160 * len(CHUNK)
    assert max_ahead <= (2 << 20) + 2 * len(CHUNK)
    assert threading.get_ident() not in ingest.threads


def test_the_event_loop_runs_while_the_sink_works(tmp_path: Path) -> None:
    async def run(ingest: Ingest) -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.create_task(tick())
        await receive(chunks_of(CHUNK * 80), ingest)
        ticking.cancel()
        return ticks

    with SlowIngest(LocalArtifacts(tmp_path)) as ingest:
        assert asyncio.run(run(ingest)) >= 10


def test_a_bad_body_stops_the_stream(tmp_path: Path) -> None:
    num_chunks = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal num_chunks
        while True:
            num_chunks += 1
            yield b"{}\n" * 20_000

    async def run(ingest: Ingest) -> None:
        await receive(endless(), ingest)

    with Ingest(LocalArtifacts(tmp_path), NDJSON) as ingest, pytest.raises(BadContent) as raised:
        asyncio.run(run(ingest))
    assert len(raised.value.errors) == 20
    assert num_chunks < 200


def test_the_error_of_a_broken_stream_is_raised_once_the_thread_has_ended(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield CHUNK
        raise ConnectionResetError

    async def run(ingest: SlowIngest) -> None:
        with pytest.raises(ConnectionResetError):
            await receive(broken(), ingest)
        assert not ingest.busy
        ingest.close()

    asyncio.run(run(SlowIngest(LocalArtifacts(tmp_path))))
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("cancellations", [1, 3])
def test_a_cancelled_task_waits_for_the_thread(tmp_path: Path, cancellations: int) -> None:
    async def run(ingest: SlowIngest) -> None:
        task = asyncio.create_task(receive(chunks_of(CHUNK * 200), ingest))
        while not ingest.threads:
            await asyncio.sleep(0.001)
        for _ in range(cancellations):
            task.cancel()
            await asyncio.sleep(0.001)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not ingest.busy
        ingest.close()

    asyncio.run(run(SlowIngest(LocalArtifacts(tmp_path))))
    assert list(tmp_path.rglob("*")) == []


def test_a_worker_thread_returns_results_and_raises_errors() -> None:
    def fails() -> None:
        raise KeyError("why")

    assert asyncio.run(in_worker(threading.get_ident)) != threading.get_ident()
    with pytest.raises(KeyError, match="why"):
        asyncio.run(in_worker(fails))
