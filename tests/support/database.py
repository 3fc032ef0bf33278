"""Fixtures for migrated databases: tests that use them run on SQLite and on PostgreSQL.

A migration takes most of a second, so each kind is migrated once per session and copied for every test.
"""

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
import sqlalchemy as sa

from service.store.backup import backup
from service.store.database import Database
from service.store.migrate import upgrade
from tests.support.postgres import PostgresServer


class Databases(Protocol):
    """Creates and drops databases of one kind, identified by URL."""

    def new(self, home: Path) -> str:
        """Create an empty, migrated database for ``home`` and return its URL."""

    def copy(self, url: str, home: Path) -> str:
        """Copy a database that has no open connections to ``home`` and return the URL of the copy."""

    def drop(self, url: str) -> None:
        """Drop a database and close any connections to it."""


class SqliteDatabases:
    def __init__(self, migrated: Path) -> None:
        self._migrated = migrated

    def new(self, home: Path) -> str:
        shutil.copyfile(self._migrated, home / "pathswitch.db")
        return f"sqlite:///{home / 'pathswitch.db'}"

    def copy(self, url: str, home: Path) -> str:
        backup(url, home / "pathswitch.db")
        return f"sqlite:///{home / 'pathswitch.db'}"

    def drop(self, url: str) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{sa.make_url(url).database}{suffix}").unlink(missing_ok=True)


class PostgresDatabases:
    def __init__(self, server: PostgresServer, migrated: str) -> None:
        self.server = server
        self._migrated = migrated

    def new(self, home: Path) -> str:
        return self._copy_of(self._migrated)

    def copy(self, url: str, home: Path) -> str:
        return self._copy_of(name_of(url))

    def drop(self, url: str) -> None:
        with self.server.connect() as connection:
            connection.execute(f'DROP DATABASE "{name_of(url)}" WITH (FORCE)')

    def _copy_of(self, template: str) -> str:
        name = f"copy_{uuid.uuid4().hex}"
        with self.server.connect() as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.server.url_of(name)


def name_of(url: str) -> str:
    """The database name in a PostgreSQL URL."""
    name = sa.make_url(url).database
    assert name is not None
    return name


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    path = tmp_path_factory.mktemp("migrated") / "pathswitch.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres_server: PostgresServer) -> str:
    """The name of a migrated PostgreSQL database to copy."""
    with postgres_server.connect() as connection:
        connection.execute("CREATE DATABASE migrated")
    upgrade(postgres_server.url_of("migrated"))
    return "migrated"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def databases(request: pytest.FixtureRequest) -> Databases:
    """Creates databases: first SQLite, then PostgreSQL."""
    if request.param == "sqlite":
        return SqliteDatabases(request.getfixturevalue("migrated_sqlite"))
    server = request.getfixturevalue("postgres_server")
    return PostgresDatabases(server, request.getfixturevalue("migrated_postgres"))


@pytest.fixture
def database(databases: Databases, tmp_path: Path) -> Iterator[Database]:
    """An empty, migrated database: first SQLite, then PostgreSQL."""
    database = Database(databases.new(tmp_path))
    yield database
    database.close()
    databases.drop(database.url)


@pytest.fixture
def sqlite(migrated_sqlite: Path, tmp_path: Path) -> Iterator[Database]:
    """An empty, migrated SQLite database, for tests that do not depend on the kind of database."""
    database = Database(SqliteDatabases(migrated_sqlite).new(tmp_path))
    yield database
    database.close()
