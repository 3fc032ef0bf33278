"""An event stream survives kill -9 of its server while other processes write, without loss or duplicates."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from api.schemas.common import BASE
from service.settings import Settings
from service.store import events
from service.store.database import Database
from tests.api.test_events import STREAM, events_of
from tests.support.server_process import server_process

KILLS = 3
SEEN_BEFORE_A_KILL = 40
WRITERS = 3

# Writes an event every few milliseconds and rolls some back, until its standard input is closed.
WRITER = """
import sys, threading, time
from service.store import events
from service.store.database import Database

database, name, number = Database(sys.argv[1]), sys.argv[2], 0
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
while not ended.is_set():
    try:
        with database.transaction() as session:
            events.append(session, "written", writer=name, number=number)
            if number % 7 == 6:
                time.sleep(0.01)
            if number % 11 == 10 and not ended.wait(0.001):
                number += 1
                raise KeyError
        number += 1
    except KeyError:
        continue
    ended.wait(0.005)
"""


@contextmanager
def writers(url: str) -> Iterator[None]:
    """Run writer processes for the length of the block, and wait until they have written everything."""
    started = [
        subprocess.Popen([sys.executable, "-c", WRITER, url, f"w{number}"], stdin=subprocess.PIPE)
        for number in range(WRITERS)
    ]
    yield
    for writer in started:
        assert writer.stdin is not None
        writer.stdin.close()
    assert [writer.wait(30) for writer in started] == [0] * WRITERS


def follow(url: str, last_id: str) -> Iterator[dict[str, str]]:
    """The events after ``last_id``, until the server dies."""
    headers = STREAM | {"Last-Event-ID": last_id}
    try:
        with httpx.stream("GET", f"{url}{BASE}/events", headers=headers, timeout=30) as response:
            yield from events_of(response)
    except (httpx.ReadError, httpx.RemoteProtocolError):
        return


@pytest.mark.slow_on_postgres
def test_every_event_arrives_once_and_in_order_although_the_server_is_killed(
    database: Database, tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path, database_url=database.url)
    seen: list[dict[str, str]] = []
    with writers(database.url):
        for _ in range(KILLS):
            with server_process(settings) as (url, process):
                before = len(seen)
                for event in follow(url, seen[-1]["id"] if seen else "0"):
                    seen.append(event)
                    if len(seen) - before == SEEN_BEFORE_A_KILL:
                        process.kill()  # events that it sent before are still read
    with database.reading() as session:
        written = [str(row.id) for row in events.page(session, 0, 1_000_000)]
    assert len(written) > len(seen), "the last kill must come before the last event"
    with server_process(settings) as (url, _):
        for event in follow(url, seen[-1]["id"]):
            seen.append(event)
            if event["id"] == written[-1]:
                break
    assert [event["id"] for event in seen] == written
    assert len(seen) > KILLS * SEEN_BEFORE_A_KILL
