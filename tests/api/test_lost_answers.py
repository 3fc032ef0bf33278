"""One database call fails, carried out or not: the repeated request is answered, and was carried out once."""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI

from api import deps
from api.main import create_app
from api.routes import events
from service.core.errors import DatabaseUnavailable
from service.store.database import Database
from service.store.tables import Event
from tests.support.control_plane import ControlPlane, ndjson, settings_of
from tests.support.database_faults import Faults

Send = Callable[..., httpx.Response]


class OneFault(Faults):
    """Fails the call with a given number, counted from ``arm`` on."""

    def __init__(self, *, done: bool) -> None:
        super().__init__(seed=0)
        self._done = done
        self._calls_left = 0

    def arm(self, at: int) -> None:
        self._calls_left = at

    @property
    def has_failed(self) -> bool:
        return self._calls_left <= 0

    def _draw(self, *, is_commit: bool) -> tuple[bool, bool]:
        self._calls_left -= 1
        fails = self._calls_left == 0
        return fails and not self._done, fails and self._done


@contextmanager
def served(database: Database, home: Path, faults: Faults) -> Iterator[Send]:
    """A function that sends requests into an application on that database, with the faults injected."""
    app: FastAPI = create_app(settings_of(home, database.url))
    faults.inject(app.state.services.database)

    def send(method: str, path: str, **more: object) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                return await http.request(method, f"/api/v1{path}", **more)  # type: ignore[arg-type]

        return asyncio.run(ask())

    try:
        yield send
    finally:
        app.state.services.uploads.close()
        app.state.services.small_uploads.close()
        app.state.services.database.close()


def request_for(what: str, send: Send, name: str) -> tuple[str, dict[str, Any], str]:
    """Path and content of a request, and the event it writes. Creates first what the request needs."""
    if what == "dataset":
        return "/datasets", {"json": {"name": name}}, "dataset.created"
    send("POST", "/datasets", json={"name": name}).raise_for_status()
    body: dict[str, object] = {"content": ndjson(f"{name} a", f"{name} b")}
    body["headers"] = {"Content-Type": "application/x-ndjson"}
    if what == "version":
        return f"/datasets/{name}/versions", body, "data_version.created"
    send("POST", f"/datasets/{name}/versions", **body).raise_for_status()
    if what == "model":
        return "/models", {"json": {"name": name, "dataset": name}}, "model.created"
    send("POST", "/models", json={"name": name, "dataset": name, "auto_update": False}).raise_for_status()
    return f"/models/{name}/updates", {"json": {}}, "update.created"


@pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])
@pytest.mark.parametrize("what", ["dataset", "version", "model", "update"])
def test_a_repeated_request_is_answered_and_was_carried_out_once(
    database: Database, tmp_path: Path, what: str, done: bool
) -> None:
    faults = OneFault(done=done)
    at, has_failed = 0, True
    with served(database, tmp_path / "home", faults) as send:
        while has_failed:  # one call later each time, until the request makes fewer calls
            at += 1
            path, content, event = request_for(what, send, f"n{at}")
            headers = {**content.pop("headers", {}), "Idempotency-Key": uuid.uuid4().hex}
            faults.arm(at)
            answer = send("POST", path, headers=headers, **content)
            has_failed = faults.has_failed
            if answer.status_code == 503:
                assert answer.headers["Retry-After"]
                answer = send("POST", path, headers=headers, **content)
            assert answer.status_code in (201, 202), answer.text
            with database.reading() as session:
                count = sa.select(sa.func.count()).where(Event.type == event)
                assert session.scalar(count) == at
    assert at > 15


@pytest.mark.no_database_faults("injects its own fault")
def test_the_event_stream_survives_an_outage_of_the_database(
    plane: ControlPlane, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, outages = events._read, iter([DatabaseUnavailable(), DatabaseUnavailable()])

    def fail_twice(*arguments: object) -> object:
        for outage in outages:
            raise outage
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(events, "POLL_SECONDS", 0.01)
    headers = {"Accept": "text/event-stream"}
    with plane.http.stream("GET", "/events", params={"after": "latest"}, headers=headers) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("retry")
        monkeypatch.setattr(events, "_read", fail_twice)
        plane.client.create_dataset(name)
        assert next(line for line in lines if name in line).startswith("data: ")
    assert next(outages, None) is None


def test_reading_after_a_commit_gives_up_eventually(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.store.database.RETRY_SECONDS", 0.2)
    unreachable = Database("postgresql+psycopg://nobody@127.0.0.1:1/none")
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        deps.read_after_commit(unreachable, lambda session: session)
    assert time.monotonic() - began >= 0.2
