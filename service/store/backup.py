"""A consistent copy of a SQLite database that is in use. PostgreSQL has pg_dump."""

import os
from contextlib import closing
from pathlib import Path

import pysqlite3.dbapi2 as sqlite
from sqlalchemy.engine import make_url

from service.core.errors import Conflict, InvalidRequest, NotFound


def backup(url: str, target: Path) -> None:
    """Copy the database to the file ``target``, which must not exist; it is whole or not there.

    Raises InvalidRequest for another kind of database, NotFound where there is none, Conflict for a file that exists.
    """
    place = make_url(url)
    if place.get_backend_name() != "sqlite" or not place.database:
        raise InvalidRequest("only a SQLite file is copied: of PostgreSQL make a dump with pg_dump")
    source = Path(place.database)
    if not source.is_file():
        raise NotFound(f"no database at {source}")
    if target.exists():
        raise Conflict(f"{target} exists")
    partial = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        with (
            closing(sqlite.connect(str(source), timeout=60)) as database,
            closing(sqlite.connect(str(partial))) as copy,
        ):
            database.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, not three
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
