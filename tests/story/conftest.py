"""Control planes with a home of their own, where other tests share one, and workers in this process."""

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
    """Starts a control plane that has nothing but the story's dataset, on each kind of database; settings may be given."""
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
    """A line that nothing ever happened to, to compare with: one a session, on each kind of database."""
    kind = type(databases)
    if kind not in undisturbed_lines:
        undisturbed_lines[kind] = undisturbed_line(tmp_path_factory.mktemp("undisturbed"), databases)
    return undisturbed_lines[kind]


@pytest.fixture
def workers() -> Iterator[Workers]:
    """Real workers for a control plane, in this process."""
    made: list[Any] = []

    def start(plane: ControlPlane) -> tuple[LocalExecutor, LocalServing]:
        artifacts = open_artifacts(plane.settings.artifacts)
        executor, serving = LocalExecutor(artifacts), LocalServing(artifacts, "127.0.0.1", 0)
        made.extend((serving, executor))
        return executor, serving

    yield start
    for each in made:
        each.close()
