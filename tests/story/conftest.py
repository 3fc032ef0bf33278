"""Control planes with homes of their own, in-process workers, and a reference line."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from service.artifacts import open_artifacts
from tests.support.control_plane import ControlPlane, serve, settings_of
from tests.support.database import Databases
from tests.support.story import DATASET
from tests.support.undisturbed import Undisturbed, undisturbed_line
from workers.executors.local_executor import LocalExecutor
from workers.serving.local_serving import LocalServing

NewPlane = Callable[..., ControlPlane]
Workers = Callable[[ControlPlane], tuple[LocalExecutor, LocalServing]]


@pytest.fixture
def new_plane(databases: Databases, tmp_path: Path) -> Iterator[NewPlane]:
    """Starts a control plane with an empty dataset. Tests run on SQLite and PostgreSQL; arguments are settings."""
    with ExitStack() as running:
        started = 0

        def start(**changes: Any) -> ControlPlane:
            nonlocal started
            started += 1
            home = tmp_path / f"home-{started}"
            home.mkdir()
            settings = settings_of(home, databases.new(home)).model_copy(update=changes)
            plane = running.enter_context(serve(settings))
            plane.client.create_dataset(DATASET, holdout_fraction=0.1)
            return plane

        yield start


@pytest.fixture(scope="session")
def undisturbed_lines() -> dict[type[Databases], Undisturbed]:
    return {}


@pytest.fixture
def undisturbed(
    undisturbed_lines: dict[type[Databases], Undisturbed],
    databases: Databases,
    tmp_path_factory: pytest.TempPathFactory,
) -> Undisturbed:
    """The reference line, trained without faults once per session and kind of database."""
    kind = type(databases)
    if kind not in undisturbed_lines:
        undisturbed_lines[kind] = undisturbed_line(tmp_path_factory.mktemp("undisturbed"), databases)
    return undisturbed_lines[kind]


@pytest.fixture
def workers() -> Iterator[Workers]:
    """Starts real workers for a control plane in this process."""
    started: list[Any] = []

    def start(plane: ControlPlane) -> tuple[LocalExecutor, LocalServing]:
        artifacts = open_artifacts(plane.settings.artifacts)
        executor, serving = LocalExecutor(artifacts), LocalServing(artifacts, "127.0.0.1", 0)
        started.extend((serving, executor))
        return executor, serving

    yield start
    for worker in started:
        worker.close()
