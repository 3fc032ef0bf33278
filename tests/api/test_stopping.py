"""Stopping the control plane: it answers accepted requests completely, and accepts no new ones."""

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from api.client import Client
from api.schemas.common import BASE
from service.core.stopping import DRAIN_SECONDS, PROCESS_SECONDS
from service.settings import Settings
from service.store.migrate import upgrade
from tests.bench.upload import ndjson_body
from tests.support.control_plane import ndjson
from tests.support.server_process import server_process

MIB = 1 << 20
NDJSON = {"Content-Type": "application/x-ndjson"}
DOCUMENT = b'{"name": "accepted"}'
LATE_SECONDS = 3.0  # requests in flight end this long after the signal


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    roots = tmp_path / "imports"
    roots.mkdir()
    settings = Settings(home=tmp_path, import_roots=(roots,))
    upgrade(settings.database)
    return settings


@pytest.fixture
def server(settings: Settings) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with server_process(settings) as (url, process):
        with Client(url) as client:
            for name in ("sent", "imported", "slow"):
                client.create_dataset(name)
        yield url, process


def test_accepted_requests_are_answered_and_new_ones_refused(
    settings: Settings, server: tuple[str, subprocess.Popen[bytes]]
) -> None:
    url, process = server
    can_import, late = threading.Event(), threading.Event()
    file = settings.import_roots[0] / "large.ndjson"
    file.write_bytes(b"".join(ndjson_body(64 * MIB)))

    def body() -> Iterator[bytes]:
        yield ndjson("a")
        assert late.wait(60)
        yield ndjson("b")

    def upload() -> httpx.Response:
        return httpx.post(f"{url}{BASE}/datasets/sent/versions", content=body(), headers=NDJSON, timeout=60)

    def import_() -> httpx.Response:
        assert can_import.wait(60)
        source = {"uri": file.as_uri()}
        return httpx.post(f"{url}{BASE}/datasets/imported/versions", json=source, timeout=60)

    followed: list[str] = []

    def follow() -> None:
        headers = {"Accept": "text/event-stream"}
        with httpx.stream("GET", f"{url}{BASE}/events", headers=headers, timeout=60) as response:
            for line in response.iter_lines():  # raises if the stream does not end properly
                followed.append(line)

    with (
        ThreadPoolExecutor() as clients,
        connected(url) as idle,
        connected(url) as slow,
        closing(HTTPConnection(urlsplit(url).netloc, timeout=60)) as kept,
    ):
        kept.request("GET", "/healthz")
        assert kept.getresponse().read()
        sending, following = clients.submit(upload), clients.submit(follow)
        wait_until(lambda: staged(settings) == 1 and created(followed) == 3)
        head = f"POST {BASE}/datasets HTTP/1.1\r\nHost: x\r\nContent-Length: {len(DOCUMENT)}\r\n"
        slow.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + DOCUMENT[:9])
        can_import.set()
        importing = clients.submit(import_)
        wait_until(lambda: staged(settings) == 2)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        for connection in (idle, kept.sock):
            assert connection.recv(1) == b"", "idle connections are closed, whether used before or not"
        wait_until(lambda: refused(url))
        threading.Timer(LATE_SECONDS, late.set).start()
        assert late.wait(60)
        slow.sendall(DOCUMENT[9:])
        assert process.poll() is None
        sent, imported = sending.result(), importing.result()
        following.result()
        process.wait(PROCESS_SECONDS)
        seconds = time.monotonic() - began
        posted = received(slow)
    print(f"stopped in {seconds:.1f} s")
    assert LATE_SECONDS < seconds < PROCESS_SECONDS
    assert (sent.status_code, sent.json()["documents"]) == (201, 2)
    assert imported.status_code == 201
    assert created(followed) == 3
    assert posted.startswith(b"HTTP/1.1 201 ")
    assert posted.endswith(b"}")
    assert staged(settings) == 0


@pytest.mark.slow
def test_a_request_that_takes_too_long_is_cut_off_and_leaves_no_files(
    settings: Settings, server: tuple[str, subprocess.Popen[bytes]]
) -> None:
    url, process = server
    with connected(url) as endless:
        head = f"POST {BASE}/datasets/slow/versions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
        endless.sendall(f"{head}Content-Type: application/x-ndjson\r\n\r\n".encode() + ndjson("a"))
        wait_until(lambda: staged(settings) == 1)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(PROCESS_SECONDS)
        seconds = time.monotonic() - began
    print(f"stopped in {seconds:.1f} s")
    assert DRAIN_SECONDS - 1 < seconds < PROCESS_SECONDS
    assert process.returncode != -signal.SIGALRM
    assert staged(settings) == 0


def connected(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=60)


def refused(url: str) -> bool:
    try:
        connected(url).close()
    except ConnectionRefusedError:
        return True
    return False


def received(connection: socket.socket) -> bytes:
    answer = b""
    while more := connection.recv(1 << 16):
        answer += more
    return answer


def created(lines: list[str]) -> int:
    return lines.count("event: dataset.created")


def staged(settings: Settings) -> int:
    return len(list((settings.home / "artifacts").glob(".ingest-*")))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)
