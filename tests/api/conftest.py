"""One control plane per kind of database for the whole session. Every test uses its own names."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.control_plane import ControlPlane, serve, settings_of
from tests.support.postgres import PostgresServer

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def plane(migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane on SQLite."""
    home = tmp_path_factory.mktemp("home")
    shutil.copyfile(migrated_sqlite, home / "pathswitch.db")
    with serve(settings_of(home, f"sqlite:///{home / 'pathswitch.db'}")) as plane:
        yield plane


@pytest.fixture(scope="session")
def postgres_plane(
    postgres_server: PostgresServer, migrated_postgres: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ControlPlane]:
    """A control plane on PostgreSQL."""
    with postgres_server.connect() as connection:
        connection.execute(f'CREATE DATABASE control_plane TEMPLATE "{migrated_postgres}"')
    home = tmp_path_factory.mktemp("home")
    with serve(settings_of(home, postgres_server.url_of("control_plane"))) as plane:
        yield plane


@pytest.fixture(params=["plane", pytest.param("postgres_plane", marks=pytest.mark.postgres)])
def each_plane(request: pytest.FixtureRequest) -> ControlPlane:
    """Each control plane in turn, for tests that depend on the database."""
    plane: ControlPlane = request.getfixturevalue(request.param)
    return plane


@pytest.fixture
def name() -> str:
    """A name that no other test uses."""
    return f"n{next(_numbers)}"
