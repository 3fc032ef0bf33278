"""Serving as it runs in production, with nothing to train: a Ray, an orchestrator over a database, and one model line of two
versions.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from service.artifacts import Artifacts
from service.core.states import ModelVersionState, ReleaseState, UpdateState
from service.main import tick_until
from service.operations.models import change_model
from service.operations.releases import release_version
from service.orchestrator.loop import Orchestrator
from service.store import datasets, migrate, releases, updates
from service.store.database import Database, now
from service.store.tables import Checkpoint, ModelVersion
from tests.bench.serve_model import write_served_model
from tests.support.engines import engine_pids
from tests.support.ports import free_ports
from tests.support.ray_cluster import connected, started_ray
from tests.support.rows import add_dataset, add_model, add_running_update
from tests.support.scripted import ScriptedExecutor

MODEL = "m"
VERSIONS = (1, 2)
REPLICA, INGRESS, PROXY, CONTROLLER = (
    f"ServeReplica:model-{MODEL}",
    "ServeReplica:ingress",
    "ProxyActor",
    "ServeController",
)
ENGINE = "engine"  # of the version that was loaded last
TICK_SECONDS = 0.25
RELEASE_SECONDS = 120.0


@dataclass
class World:
    url: str
    database: Database
    ray_pid: int

    def release(self, number: int) -> float:
        """Have the version served, and wait until every replica answers with it. How long it took, in seconds."""
        began = time.monotonic()
        asked = release_version(self.database, MODEL, number, by="bench").id
        while True:
            with self.database.reading() as session:
                row = releases.get(session, asked)
                if row.state == ReleaseState.LIVE:
                    return time.monotonic() - began
                assert row.state == ReleaseState.PENDING, row.error
            assert time.monotonic() - began < RELEASE_SECONDS, "never live"
            time.sleep(0.05)

    def keep(self, versions: int) -> None:
        """How many earlier versions stay loaded, from the next release on."""
        change_model(self.database, MODEL, {"serving": {"keep": versions}})

    def pid(self, part: str) -> int:
        """Of the process of this Ray whose title begins with ``part``, e.g. ``ServeReplica:model-m``; or of an engine's."""
        if part == ENGINE:
            return engine_pids(self.pid(REPLICA))[-1]
        for process in psutil.Process(self.ray_pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{part}"):
                    return process.pid
        raise LookupError(part)

    def kill(self, part: str) -> None:
        """With kill -9."""
        os.kill(self.pid(part), signal.SIGKILL)

    def serving_bytes(self) -> dict[str, int]:
        """Memory of the processes that answer, by part: what is theirs alone."""
        return {
            part: psutil.Process(self.pid(part)).memory_full_info().uss
            for part in (REPLICA, ENGINE, INGRESS, PROXY)
        }


@contextmanager
def serving_world(folder: Path) -> Iterator[World]:
    """The first version is live when it begins."""
    artifacts = Artifacts(folder / "artifacts")
    for number in VERSIONS:
        with artifacts.writing(f"export/{number}") as directory:
            write_served_model(directory, seed=number)
            artifacts.publish(f"export/{number}", directory, {})
    url = f"sqlite:///{folder / 'bench.db'}"
    migrate.upgrade(url)
    database = Database(url)
    _add_versions(database)
    with started_ray() as cluster, connected(cluster):
        # Ray reads its token when it is imported: not before there is one.
        from ray import serve

        from workers.serving.ray_serving import RayServing

        [port] = free_ports(1)
        serving = RayServing(artifacts.url, "127.0.0.1", port)
        orchestrator = Orchestrator(database, artifacts, ScriptedExecutor(artifacts), serving, "bench")
        stopping = threading.Event()
        ticking = threading.Thread(target=tick_until, args=(stopping, orchestrator, TICK_SECONDS))
        ticking.start()
        try:
            world = World(serving.url(), database, cluster.pid)
            world.release(1)
            yield world
        finally:
            stopping.set()
            ticking.join()
            serve.shutdown()


def _add_versions(database: Database) -> None:
    with database.transaction() as session:
        dataset = add_dataset(session, "d", len(VERSIONS))
        model = add_model(session, dataset, MODEL)
        for number in VERSIONS:
            update = add_running_update(session, model, datasets.version(session, dataset.id, number))
            updates.move(session, update, UpdateState.SUCCEEDED)
            checkpoint = Checkpoint(
                model_id=model.id,
                step=number,
                data_version=number,
                artifact_key=f"checkpoint/{number}",
                sha256="",
                bytes=1,
                created_at=now(session),
            )
            session.add(checkpoint)
            session.flush()
            session.add(
                ModelVersion(
                    model_id=model.id,
                    number=number,
                    data_version=number,
                    update_id=update.id,
                    state=ModelVersionState.CANDIDATE,
                    checkpoint_id=checkpoint.id,
                    branch_point=number,
                    final_step=number,
                    parameters=10_000_000,
                    evaluations=[],
                    cost={},
                    export_key=f"export/{number}",
                    created_at=now(session),
                )
            )
