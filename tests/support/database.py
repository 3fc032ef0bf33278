"""A migrated database, on SQLite and on PostgreSQL: what every store test runs on both of."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.store.database import Database
from service.store.migrate import upgrade


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A fresh, migrated database of each kind."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'pathswitch.db'}"
    else:
        url = request.getfixturevalue("postgres_url")
    upgrade(url)
    database = Database(url)
    yield database
    database.close()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    """A fresh, migrated SQLite database, for tests that are not about the database."""
    url = f"sqlite:///{tmp_path / 'pathswitch.db'}"
    upgrade(url)
    database = Database(url)
    yield database
    database.close()
