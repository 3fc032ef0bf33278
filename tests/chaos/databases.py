"""Migrated databases for a campaign, and the rows that it starts with."""

import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psycopg
import sqlalchemy as sa

from service.core.errors import Unavailable
from service.core.states import FINISHED_UPDATES, StageState
from service.store import datasets, models, updates
from service.store.database import Database
from service.store.migrate import upgrade
from service.store.tables import Dataset, DataVersion, Stage, Update
from tests.support.postgres import PostgresServer
from tests.support.rows import add_data_version, add_dataset, add_model

T = TypeVar("T")

PATIENCE_SECONDS = 60.0


class Databases:
    """Databases of one kind, under ``folder`` or on a server: migrated once, then copied."""

    def __init__(self, kind: str, folder: Path, server: PostgresServer | None = None) -> None:
        self.kind, self._folder, self._server = kind, folder, server
        if kind == "sqlite":
            self._template = folder / f"template-{uuid.uuid4().hex}.db"
            upgrade(f"sqlite:///{self._template}")
        else:
            self._name = f"template_{uuid.uuid4().hex}"
            self._execute(f'CREATE DATABASE "{self._name}"')
            assert server is not None
            upgrade(server.url_of(self._name))

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """Yield the URL of a new database and drop it at the end."""
        name = f"chaos_{uuid.uuid4().hex}"
        if self.kind == "sqlite":
            path = self._folder / f"{name}.db"
            shutil.copyfile(self._template, path)
            yield f"sqlite:///{path}"
            for file in self._folder.glob(f"{name}.db*"):
                file.unlink()
            return
        assert self._server is not None
        self._execute(f'CREATE DATABASE "{name}" TEMPLATE "{self._name}"')
        yield self._server.url_of(name)
        self._execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def _execute(self, statement: str) -> None:
        assert self._server is not None
        for _ in range(50):
            try:
                with self._server.connect() as connection:
                    connection.execute(statement)
                return
            except psycopg.errors.ObjectInUse:  # another process is copying the same template
                time.sleep(0.05)
        raise TimeoutError(statement)


@contextmanager
def opened(url: str) -> Iterator[Database]:
    """Open a database for the block only, because no engine may be open when a process forks."""
    database = Database(url)
    try:
        yield database
    finally:
        database.close()


def with_retries(act: Callable[[], T]) -> T:
    """Retry while the database is unavailable, as a client would."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return act()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def add_line(database: Database, name: str) -> None:
    """Add a dataset without data and a model that follows it, both called ``name``."""
    with database.transaction() as session:
        add_model(session, add_dataset(session, name, 0), name)


def push(database: Database, name: str, number: int) -> None:
    """Add data version ``number`` and its update in one transaction, as a registration does. Idempotent."""
    with database.transaction() as session:
        dataset = datasets.dataset(session, name, lock=True)
        if any(row.number == number for row in datasets.versions(session, dataset.id)):
            return
        row = add_data_version(session, dataset, number)
        for model in models.following(session, [dataset.id]).get(dataset.id, ()):
            updates.add(session, model, row)


def unfinished(database: Database) -> int:
    with database.reading() as session:
        query = sa.select(sa.func.count()).select_from(Update)
        return session.scalar(query.where(Update.state.not_in(FINISHED_UPDATES))) or 0


def holders(database: Database) -> Sequence[str]:
    """The owners of running stages."""
    with database.reading() as session:
        query = sa.select(Stage.owner).where(Stage.state == StageState.RUNNING, Stage.owner.is_not(None))
        return [str(owner) for owner in session.scalars(query.distinct())]


def accepted(database: Database) -> dict[str, list[int]]:
    """Dataset name -> numbers of its data versions."""
    with database.reading() as session:
        query = sa.select(Dataset.name, DataVersion.number).join(
            Dataset, Dataset.id == DataVersion.dataset_id
        )
        numbers: dict[str, list[int]] = {}
        for name, number in session.execute(query.order_by(Dataset.name, DataVersion.number)):
            numbers.setdefault(name, []).append(number)
        return numbers
