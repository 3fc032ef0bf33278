"""Large and concurrent uploads: memory stays flat, and every row is right."""

import itertools
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from api.client import Client, DataFormat
from api.main import MAX_UPLOADS
from service.settings import Settings
from service.store.migrate import upgrade
from tests.bench.upload import ndjson_body
from tests.support.control_plane import ControlPlane, ndjson
from tests.support.server_process import MemoryWatch, server_process

BY_SOCKET = pytest.mark.no_database_faults("uses a raw socket, which does not retry")

MIB = 1 << 20
CONCURRENT = 8
NUM_STREAMS = 16


def all_at_once(count: int, push: Callable[[int], httpx.Response]) -> list[httpx.Response]:
    """Call ``push`` for 0 to count-1, each on a thread of its own, all at the same time."""
    barrier = threading.Barrier(count)

    def one(number: int) -> httpx.Response:
        barrier.wait()
        return push(number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


def test_memory_stays_flat_while_100_mib_stream_in(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    upgrade(settings.database)
    with server_process(settings) as (url, process), Client(url) as client:
        client.create_dataset("d")
        client.push_version("d", ndjson_body(1 * MIB, seed=1), format=DataFormat.NDJSON)
        with MemoryWatch(process.pid) as memory:
            version, _ = client.push_version("d", ndjson_body(100 * MIB), format=DataFormat.NDJSON)
    assert version.bytes >= 100 * MIB
    assert memory.growth <= 64 * MIB


def test_memory_stays_flat_while_many_stream_in_at_once(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    upgrade(settings.database)
    with server_process(settings) as (url, process), Client(url) as client:
        for number in range(NUM_STREAMS):
            client.create_dataset(f"d{number}")
        client.push_version("d0", ndjson_body(1 * MIB, seed=NUM_STREAMS), format=DataFormat.NDJSON)

        def push(number: int) -> str:
            with Client(url) as own:
                body = ndjson_body(8 * MIB, seed=number)
                return own.push_version(f"d{number}", body, format=DataFormat.NDJSON)[0].sha256

        with MemoryWatch(process.pid) as memory, ThreadPoolExecutor(NUM_STREAMS) as threads:
            assert len(set(threads.map(push, range(NUM_STREAMS)))) == NUM_STREAMS
    assert memory.growth <= 64 * MIB


def test_the_same_content_at_once_is_one_row(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name)
    answers = all_at_once(CONCURRENT, lambda _: each_plane.push(name, "a", "b", "c"))
    assert sorted(answer.status_code for answer in answers) == [200] * (CONCURRENT - 1) + [201]
    assert len({answer.text for answer in answers}) == 1
    assert len(each_plane.http.get(f"/datasets/{name}/versions").json()["data"]) == 1


def test_different_content_at_once_gets_numbers_and_duplicates_right(
    each_plane: ControlPlane, name: str
) -> None:
    """All bodies share one document: it is new in the first version and a duplicate in all others."""
    each_plane.add_dataset(name)
    answers = all_at_once(CONCURRENT, lambda i: each_plane.push(name, "shared", f"own {i}", f"more {i}"))
    assert [answer.status_code for answer in answers] == [201] * CONCURRENT
    rows = sorted((answer.json() for answer in answers), key=lambda row: row["number"])
    assert [row["number"] for row in rows] == list(range(1, CONCURRENT + 1))
    assert [row["duplicates"] for row in rows] == [0] + [1] * (CONCURRENT - 1)


@BY_SOCKET
def test_a_client_that_hangs_up_leaves_nothing(plane: ControlPlane, name: str) -> None:
    plane.add_dataset(name)
    address = urlsplit(plane.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"POST /api/v1/datasets/{name}/versions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
        connection.sendall(f"{head}Content-Type: application/x-ndjson\r\n\r\n".encode() + ndjson("a"))
        _wait_until(lambda: _staged(plane) == 1)
    _wait_until(lambda: _staged(plane) == 0)
    assert plane.http.get(f"/datasets/{name}/versions").json()["data"] == []
    assert plane.push(name, "a", "b").status_code == 201


@pytest.mark.no_database_faults(
    "no body ends before all have started, so a client would see a refusal too late"
)
def test_uploads_beyond_the_limit_wait_for_a_slot(plane: ControlPlane, name: str) -> None:
    plane.add_dataset(name)
    proceed = threading.Event()

    def slow_body(number: int) -> Iterator[bytes]:
        yield ndjson(f"document {number}")
        proceed.wait(30)
        yield ndjson(f"more {number}")

    def push(number: int) -> httpx.Response:
        with httpx.Client(base_url=plane.http.base_url, timeout=60) as http:
            headers = {"Content-Type": "application/x-ndjson"}
            return http.post(f"/datasets/{name}/versions", content=slow_body(number), headers=headers)

    with ThreadPoolExecutor(MAX_UPLOADS + 1) as threads:
        pending = [threads.submit(push, number) for number in range(MAX_UPLOADS)]
        try:
            _wait_until(lambda: _staged(plane) == MAX_UPLOADS)
            pending.append(threads.submit(push, MAX_UPLOADS))
            assert plane.push(name, "short").status_code == 201, "a small upload must not wait for large ones"
            time.sleep(0.2)
            assert _staged(plane) == MAX_UPLOADS
        finally:
            proceed.set()
        assert {future.result().status_code for future in pending} == {201}


def test_the_server_answers_while_a_body_streams_in(plane: ControlPlane, name: str) -> None:
    plane.add_dataset(name)
    answers = itertools.count()

    def body() -> Iterator[bytes]:
        for chunk in ndjson_body(8 * MIB):
            if plane.root.get("/healthz").status_code == 200:
                next(answers)
            yield chunk

    plane.client.push_version(name, body(), format=DataFormat.NDJSON)
    assert next(answers) > 100


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_stops_on_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """Even while a client follows the endless stream of events."""
    settings = Settings(home=tmp_path)
    upgrade(settings.database)
    with server_process(settings) as (url, process):
        headers = {"Accept": "text/event-stream"}
        with httpx.stream("GET", f"{url}/api/v1/events", headers=headers) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("retry")
            process.send_signal(number)
            list(lines)
        assert process.wait(10) in (0, -number)


@pytest.mark.postgres
def test_concurrent_registrations_in_different_datasets_do_not_deadlock(
    postgres_plane: ControlPlane, name: str
) -> None:
    """They share only locks. Taken in different orders, those would deadlock."""
    for number in range(CONCURRENT):
        postgres_plane.add_dataset(f"{name}-{number}")
    answers = [
        answer
        for turn in range(4)
        for answer in all_at_once(
            CONCURRENT,
            lambda i, turn=turn: postgres_plane.push(f"{name}-{i}", f"{turn} {i}", f"more {turn} {i}"),
        )
    ]
    assert [answer.status_code for answer in answers] == [201] * len(answers)


@BY_SOCKET
@pytest.mark.parametrize("chunked", [False, True], ids=["Content-Length", "chunked"])
@pytest.mark.parametrize("percent", [1, 50, 99])
def test_an_upload_that_is_cut_leaves_nothing(
    plane: ControlPlane, name: str, percent: int, chunked: bool
) -> None:
    plane.add_dataset(name)
    before = _files(plane)
    body = b"".join(ndjson_body(4 * MIB, seed=percent))
    address = urlsplit(plane.url)
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = f"POST /api/v1/datasets/{name}/versions HTTP/1.1\r\nHost: x\r\n{length}\r\n"
    sent = body[: len(body) * percent // 100]
    if chunked:
        sent = b"%x\r\n%b\r\n" % (len(sent), sent)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(f"{head}Content-Type: application/x-ndjson\r\n\r\n".encode() + sent)
        _wait_until(lambda: _staged(plane) == 1)
    _wait_until(lambda: _staged(plane) == 0)
    assert plane.http.get(f"/datasets/{name}/versions").json()["data"] == []
    assert _files(plane) == before


def _files(plane: ControlPlane) -> set[Path]:
    return set(plane.artifacts.root.rglob("*"))


def _staged(plane: ControlPlane) -> int:
    return len(list(plane.artifacts.root.glob(".ingest-*")))


def _wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("the condition did not become true within 10 seconds")
