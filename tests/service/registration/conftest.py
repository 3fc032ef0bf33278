from collections.abc import Iterator
from pathlib import Path

import pytest

from service.operations.datasets import create_dataset
from service.store.database import Database
from tests.service.registration.harness import HOLDOUT_FRACTION, Process


@pytest.fixture
def processes(database: Database, tmp_path: Path) -> Iterator[tuple[Process, Process]]:
    """Two processes on the same database and artifacts, with a dataset."""
    create_dataset(database, "d", holdout_fraction=HOLDOUT_FRACTION)
    second = Database(database.url)
    yield Process(database, tmp_path / "artifacts"), Process(second, tmp_path / "artifacts")
    second.close()


@pytest.fixture
def process(processes: tuple[Process, Process]) -> Process:
    return processes[0]
