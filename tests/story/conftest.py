"""Control planes with a home of their own, where other tests share one, and workers in this process."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from service.artifacts import Artifacts
from tests.support.control_plane import ControlPlane, serve, settings_of
from tests.support.story import DATASET
from tests.support.undisturbed import Undisturbed, undisturbed_line
from workers.local_executor import LocalExecutor
from workers.serving.local_serving import LocalServing

NewPlane = Callable[..., ControlPlane]
Workers = Callable[[ControlPlane], tuple[LocalExecutor, LocalServing]]


@pytest.fixture
def new_plane(migrated_sqlite: Path, tmp_path: Path) -> Iterator[NewPlane]:
    """Starts a control plane that has nothing but the story's dataset; settings may be given."""
    with ExitStack() as running:
        started = 0

        def start(**changes: Any) -> ControlPlane:
            nonlocal started
            started += 1
            home = tmp_path / f"home-{started}"
            settings = settings_of(home, f"sqlite:///{home / 'pathswitch.db'}").model_copy(update=changes)
            shutil.copyfile(migrated_sqlite, home / "pathswitch.db")
            plane = running.enter_context(serve(settings))
            plane.client.create_dataset(DATASET, holdout_fraction=0.1)
            return plane

        yield start


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Undisturbed:
    """A line that nothing ever happened to, to compare with."""
    return undisturbed_line(tmp_path_factory.mktemp("undisturbed"), migrated_sqlite)


@pytest.fixture
def workers() -> Iterator[Workers]:
    """Real workers for a control plane, in this process."""
    made: list[Any] = []

    def start(plane: ControlPlane) -> tuple[LocalExecutor, LocalServing]:
        artifacts = Artifacts.from_url(plane.settings.artifacts)
        executor, serving = LocalExecutor(artifacts), LocalServing(artifacts, "127.0.0.1", 0)
        made.extend((serving, executor))
        return executor, serving

    yield start
    for each in made:
        each.close()
