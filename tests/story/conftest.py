"""Control planes with a home of their own, where other tests share one."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.control_plane import ControlPlane, serve, settings_of
from tests.support.story import DATASET

NewPlane = Callable[[], ControlPlane]


@pytest.fixture
def new_plane(migrated_sqlite: Path, tmp_path: Path) -> Iterator[NewPlane]:
    """Starts a control plane that has nothing but the story's dataset."""
    with ExitStack() as running:
        started = 0

        def start() -> ControlPlane:
            nonlocal started
            started += 1
            home = tmp_path / f"home-{started}"
            settings = settings_of(home, f"sqlite:///{home / 'pathswitch.db'}")
            shutil.copyfile(migrated_sqlite, home / "pathswitch.db")
            plane = running.enter_context(serve(settings))
            plane.client.create_dataset(DATASET, holdout_fraction=0.1)
            return plane

        yield start
