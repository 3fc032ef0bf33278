"""Fresh, migrated databases of each kind, and the rows that a campaign begins with."""

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

AWAY_SECONDS = 60.0


class Databases:
    """Databases of one kind under ``folder``, or on a server; migrated once, then copied."""

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
        """The URL of a database that nobody has used."""
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
                    connection.execute(statement)  # type: ignore[call-overload]
                return
            except psycopg.errors.ObjectInUse:  # of a template: another copy is being made
                time.sleep(0.05)
        raise TimeoutError(statement)


@contextmanager
def opened(url: str) -> Iterator[Database]:
    """A database that is closed again: no engine may be open where processes are forked."""
    database = Database(url)
    try:
        yield database
    finally:
        database.close()


def patiently(act: Callable[[], T]) -> T:
    """Act as a client would: come again while the database is away."""
    deadline = time.monotonic() + AWAY_SECONDS
    while True:
        try:
            return act()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def add_line(database: Database, name: str) -> None:
    """A model on a dataset of its own, both of that name, without data."""
    with database.transaction() as session:
        add_model(session, add_dataset(session, name, 0), name)


def push(database: Database, name: str, number: int) -> None:
    """Data version ``number`` of a line with its update, in one transaction, as registering data does; once."""
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
    """Owners of running stages."""
    with database.reading() as session:
        query = sa.select(Stage.owner).where(Stage.state == StageState.RUNNING, Stage.owner.is_not(None))
        return [str(owner) for owner in session.scalars(query.distinct())]


def accepted(database: Database) -> dict[str, list[int]]:
    """Dataset name -> numbers of its data versions."""
    with database.reading() as session:
        query = sa.select(Dataset.name, DataVersion.number).join(
            Dataset, Dataset.id == DataVersion.dataset_id
        )
        found: dict[str, list[int]] = {}
        for name, number in session.execute(query.order_by(Dataset.name, DataVersion.number)):
            found.setdefault(name, []).append(number)
        return found
