"""Copies a SQLite database that is in use. For PostgreSQL there is pg_dump."""

import os
from contextlib import closing
from pathlib import Path

import pysqlite3.dbapi2 as sqlite
from sqlalchemy.engine import make_url

from service.core.errors import Conflict, InvalidRequest, NotFound


def backup(url: str, target: Path) -> None:
    """Write a consistent copy of the database to ``target``, which appears only when it is complete.

    Raises InvalidRequest for other databases than SQLite, NotFound if there is no database, Conflict if ``target``
    exists.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        raise InvalidRequest("only SQLite databases can be copied: use pg_dump for PostgreSQL")
    source = Path(parsed.database)
    if not source.is_file():
        raise NotFound(f"there is no database at {source}")
    if target.exists():
        raise Conflict(f"{target} already exists: choose another file")
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
