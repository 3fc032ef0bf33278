"""A reference line of two versions, trained without faults, and a copy of its home between the two versions.

Both training stages of the second version take several seconds and write several checkpoints, so that tests can
interrupt them. The first version is trained without Ray, which gives the same bits and saves a minute.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from api.client import Client, DataFormat
from api.schemas.costs import Costs
from api.schemas.models import ModelVersion
from service.artifacts import open_artifacts
from service.core.executor import Executor
from service.core.serving import Serving
from service.core.stage_specs import StageKind
from service.settings import Settings
from tests.support.control_plane import ControlPlane, ndjson, serve, settings_of
from tests.support.database import Databases
from tests.support.story import DATASET, SPEC, push_and_release, released
from tests.support.training import texts_of
from tests.support.watched_update import WatchedUpdate
from workers.executors.local_executor import LocalExecutor
from workers.serving.local_serving import LocalServing

# A step takes 15 to 25 ms on one core, so an interval takes two seconds: four times the delay of reported points.
CHECKPOINT_EVERY = 100
LONG: dict[str, Any] = SPEC | {
    "training": SPEC["training"]
    | {"batch_tokens": 1024, "epochs": 10, "checkpoint_every": CHECKPOINT_EVERY, "precision": "fp32"},
    "paradigm": {"name": "path_switching", "decay": {"length": {"rule": "fixed", "fraction": 0.5}}},
}
MODEL = LONG["name"]
NEW_DOCUMENTS = 300


@dataclass(frozen=True)
class Undisturbed:
    """The reference: ``losses`` by step of the second version, and the line's ``costs`` after it."""

    databases: Databases
    between: Settings  # the service after the release of the first version
    second: ModelVersion
    losses: dict[StageKind, dict[int, float]]
    costs: Costs

    def service_between(self, home: Path) -> Settings:
        """Copy the service as it was between the versions to ``home``."""
        return _copy(self.databases, self.between, home)


def undisturbed_line(folder: Path, databases: Databases) -> Undisturbed:
    """Train both versions under ``folder``."""
    settings = first_version(folder / "home", databases)
    between = _copy(databases, settings, folder / "between")
    with _service(settings) as (plane, executor, serving):
        update = WatchedUpdate(plane.client, plane.database, plane.artifacts, push_second(plane.client))
        second = released(plane, executor, serving, MODEL)
        losses = {kind: update.losses(kind) for kind in (StageKind.TRAIN_TRUNK, StageKind.TRAIN_BRANCH)}
        return Undisturbed(databases, between, second, losses, plane.client.costs(MODEL))


def first_version(home: Path, databases: Databases, **changes: Any) -> Settings:
    """Create a service, release the line's first version, and stop the service. ``changes`` are settings."""
    home.mkdir()
    settings = settings_of(home, databases.new(home)).model_copy(update=changes)
    with _service(settings) as (plane, executor, serving):
        plane.client.create_dataset(DATASET, holdout_fraction=0.1)
        plane.client.create_model(LONG)
        push_and_release(plane, 1, executor, serving, MODEL)
    return settings


@contextmanager
def _service(settings: Settings) -> Iterator[tuple[ControlPlane, Executor, Serving]]:
    artifacts = open_artifacts(settings.artifacts)
    executor, serving = LocalExecutor(artifacts), LocalServing(artifacts, "127.0.0.1", 0)
    try:
        with serve(settings) as plane:
            yield plane, executor, serving
    finally:
        serving.close()
        executor.close()


def _copy(databases: Databases, settings: Settings, home: Path) -> Settings:
    shutil.copytree(settings.home / "artifacts", home / "artifacts")
    return settings_of(home, databases.copy(settings.database, home))


def push_second(client: Client) -> str:
    """Push the second data version. Returns the id of its update."""
    body = ndjson(*texts_of(2, NEW_DOCUMENTS))
    [update_id] = client.push_version(DATASET, [body], format=DataFormat.NDJSON).row.updates
    return update_id
