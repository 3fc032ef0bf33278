"""An async stream into the sink: backpressure, a free event loop, a thread that always comes to rest."""

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
    """Takes its time, and knows which threads it was on and how much it was given."""

    def __init__(self, artifacts: Artifacts) -> None:
        super().__init__(artifacts, NDJSON)
        self.threads: set[int] = set()
        self.fed = 0
        self.busy = False

    def feed(self, chunk: bytes) -> None:
        assert not self.busy
        self.busy = True
        self.threads.add(threading.get_ident())
        time.sleep(0.05)
        super().feed(chunk)
        self.fed += len(chunk)
        self.busy = False


@pytest.mark.parametrize("size", [1, 1000, 1 << 16, 3 << 20])
def test_a_stream_is_received_whole(tmp_path: Path, size: int) -> None:
    body = ndjson(*(f"{number} " + "x" * 2000 for number in range(1500 if size > 1 else 3)))

    async def run(ingest: Ingest) -> Body:
        return await receive(chunks_of(body, size), ingest)

    with Ingest(LocalArtifacts(tmp_path / "a"), NDJSON) as ingest:
        received = asyncio.run(run(ingest))
    with Ingest(LocalArtifacts(tmp_path / "b"), NDJSON) as ingest:
        ingest.feed(body)
        assert received == ingest.end()


def test_no_more_is_asked_for_than_the_sink_takes(tmp_path: Path) -> None:
    async def run(ingest: SlowIngest) -> int:
        furthest = asked = 0

        async def counted() -> AsyncIterator[bytes]:
            nonlocal furthest, asked
            for _ in range(160):
                asked += len(CHUNK)
                furthest = max(furthest, asked - ingest.fed)
                yield CHUNK

        await receive(counted(), ingest)
        return furthest

    with SlowIngest(LocalArtifacts(tmp_path)) as ingest:
        furthest = asyncio.run(run(ingest))
        assert ingest.fed == 160 * len(CHUNK)
    assert furthest <= (2 << 20) + 2 * len(CHUNK)
    assert threading.get_ident() not in ingest.threads


def test_the_loop_goes_on_while_the_sink_works(tmp_path: Path) -> None:
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


def test_a_bad_body_ends_the_reading(tmp_path: Path) -> None:
    asked = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal asked
        while True:
            asked += 1
            yield b"{}\n" * 20_000

    async def run(ingest: Ingest) -> None:
        await receive(endless(), ingest)

    with Ingest(LocalArtifacts(tmp_path), NDJSON) as ingest, pytest.raises(BadContent) as raised:
        asyncio.run(run(ingest))
    assert len(raised.value.errors) == 20
    assert asked < 200


def test_a_broken_stream_is_passed_on_when_the_thread_is_at_rest(tmp_path: Path) -> None:
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


def test_work_on_a_worker_thread_gives_its_result_and_its_error() -> None:
    def fails() -> None:
        raise KeyError("why")

    assert asyncio.run(in_worker(threading.get_ident)) != threading.get_ident()
    with pytest.raises(KeyError, match="why"):
        asyncio.run(in_worker(fails))
