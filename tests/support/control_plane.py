"""A control plane for tests: a real server on a free port, with a scripted orchestrator."""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import sqlalchemy as sa
import uvicorn
from fastapi import FastAPI

from api.client import Client
from api.main import Server, create_app
from api.schemas.common import BASE
from service.artifacts import Artifacts, open_artifacts
from service.core.executor import Executor, Point, RunError, StageCall
from service.core.serving import Serving
from service.core.stage_specs import StageKind
from service.core.states import FINISHED_UPDATES, StageState, UpdateState
from service.orchestrator.loop import Orchestrator
from service.settings import Settings
from service.store import models, updates
from service.store.database import Database
from service.store.tables import Update
from tests.support.scripted import ScriptedExecutor, ScriptedServing
from tests.support.specs import PLAIN

START_SECONDS = 30.0
UPDATE_SECONDS = 240.0
TICK_SECONDS = 0.02

EXPORT_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "weights/model.safetensors": bytes(range(256)) * 1000,
}


class ExportingExecutor(ScriptedExecutor):
    """A scripted executor whose exports have real files, also in a subfolder."""

    def _execute(self, call: StageCall, points: list[Point]) -> None:
        if StageKind(call.kind) != StageKind.EXPORT:
            super()._execute(call, points)
            return
        with self.artifacts.writing(call.key) as directory:
            for name, content in EXPORT_FILES.items():
                (directory / name).parent.mkdir(exist_ok=True)
                (directory / name).write_bytes(content)
            self.artifacts.publish(call.key, directory, {"parameters": 1000})


@dataclass
class ControlPlane:
    """A running control plane. ``http`` requests routes under the base path, ``root`` those outside of it."""

    url: str
    settings: Settings
    database: Database
    artifacts: Artifacts
    client: Client
    http: httpx.Client
    root: httpx.Client

    def __post_init__(self) -> None:
        self.executor = ExportingExecutor(self.artifacts)
        self.serving = ScriptedServing()
        self._orchestrators: dict[tuple[int, int], Orchestrator] = {}

    def add_dataset(self, name: str, *versions: list[str], holdout_fraction: float = 0.5) -> None:
        """Create a dataset with one data version per list of texts."""
        self.client.create_dataset(name, holdout_fraction=holdout_fraction)
        for texts in versions:
            self.push(name, *texts)

    def push(self, dataset: str, *texts: str) -> httpx.Response:
        return self.http.post(
            f"/datasets/{dataset}/versions",
            content=ndjson(*texts),
            headers={"Content-Type": "application/x-ndjson"},
        )

    def finish(self, model: str, executor: Executor | None = None, serving: Serving | None = None) -> None:
        """Run the orchestrator, by default with scripted workers, until the model's updates have ended."""
        orchestrator = self._orchestrator(executor or self.executor, serving or self.serving)
        deadline = time.monotonic() + UPDATE_SECONDS
        while time.monotonic() < deadline:
            progressed = orchestrator.tick()
            with self.database.reading() as session:
                rows = updates.of_model(session, models.model(session, model).id)
            if FINISHED_UPDATES.issuperset(row.state for row in rows):
                return
            if not progressed:
                time.sleep(TICK_SECONDS)
        raise AssertionError(f"the updates of {model} did not end within {UPDATE_SECONDS:.0f} s")

    def fail_next(self, kind: StageKind, *errors: RunError) -> None:
        """Make the next stages of that kind fail, after finishing what other tests left pending."""
        orchestrator = self._orchestrator(self.executor, self.serving)
        unfinished = sa.select(sa.func.count()).where(Update.state.not_in(FINISHED_UPDATES))
        deadline = time.monotonic() + UPDATE_SECONDS
        while time.monotonic() < deadline:
            with self.database.reading() as session:
                if not session.scalar(unfinished):
                    self.executor.fail[kind].extend(errors)
                    return
            if not orchestrator.tick():
                time.sleep(TICK_SECONDS)
        raise AssertionError(f"some updates did not end within {UPDATE_SECONDS:.0f} s")

    @contextmanager
    def orchestrated(
        self, executor: Executor | None = None, serving: Serving | None = None
    ) -> Iterator[None]:
        """Run the orchestrator on a thread for the length of the block."""
        orchestrator = self._orchestrator(executor or self.executor, serving or self.serving)
        stop = threading.Event()

        def run() -> None:
            while not stop.is_set():
                if not orchestrator.tick():
                    stop.wait(TICK_SECONDS)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def tick_until_running(self, model: str, kind: StageKind) -> list[str]:
        """Run the orchestrator until a stage of that kind runs.

        Returns the ids of the model's running updates.
        """
        orchestrator = self._orchestrator(self.executor, self.serving)
        deadline = time.monotonic() + UPDATE_SECONDS
        while time.monotonic() < deadline:
            orchestrator.tick()
            running = [update for update in self.client.updates(model) if update.state == UpdateState.RUNNING]
            stages = [stage for update in running for stage in update.stages]
            if any(stage.kind == kind and stage.state == StageState.RUNNING for stage in stages):
                return [update.id for update in running]
        raise AssertionError(f"no {kind} stage of {model} started")

    def _orchestrator(self, executor: Executor, serving: Serving) -> Orchestrator:
        """The orchestrator for these workers. A second one would wait for the leases of the first one."""
        key = id(executor), id(serving)
        if key not in self._orchestrators:
            owner = f"tests-{uuid.uuid4().hex[:6]}"  # unique, like the owner name of a real process
            self._orchestrators[key] = Orchestrator(self.database, self.artifacts, executor, serving, owner)
        return self._orchestrators[key]

    def add_model(self, name: str, dataset: str, **spec: object) -> None:
        """Create a plain model, changed by ``spec``, and finish its updates."""
        self.client.create_model(PLAIN | {"name": name, "dataset": dataset} | spec)
        self.finish(name)


def ndjson(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@contextmanager
def serve(settings: Settings) -> Iterator[ControlPlane]:
    """Serve a migrated database on a thread of this process."""
    app = create_app(settings)
    closing = app.state.services.closing
    server = Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None), closing)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    database = Database(settings.database)
    with (
        Client(url) as client,
        httpx.Client(base_url=url + BASE, timeout=60) as http,
        httpx.Client(base_url=url, timeout=60) as root,
    ):
        yield ControlPlane(url, settings, database, open_artifacts(settings.artifacts), client, http, root)
    database.close()
    closing.set()
    server.should_exit = True
    thread.join(START_SECONDS)
    assert not thread.is_alive()


def ask(app: FastAPI, path: str) -> httpx.Response:
    """Send one request directly to an application, without a server."""

    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get(path)

    return asyncio.run(get())


def settings_of(home: Path, database_url: str) -> Settings:
    """Settings of a control plane with the import root ``<home>/imports``."""
    roots = home / "imports"
    roots.mkdir(parents=True)
    return Settings(home=home, database_url=database_url, import_roots=(roots,))
