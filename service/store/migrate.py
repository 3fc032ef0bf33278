"""Migrates a database to the revision that this code expects, and checks that it is there.

A revision never breaks the release before it (``DECISIONS.md``), so this code also works with a database that is
ahead, because a newer release is being rolled out or was rolled back.
"""

from functools import cache
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy.engine import make_url

import migrations
from service.core.errors import DatabaseOutdated
from service.store.database import Database


def alembic_config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(next(iter(migrations.__path__)))))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    return config


def upgrade(url: str, revision: str = "head") -> None:
    """Run the missing migrations; none if the database is ahead. Creates a missing SQLite file and its folder."""
    path = make_url(url).database
    if make_url(url).get_backend_name() == "sqlite" and path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    if not _is_ahead(url):
        command.upgrade(alembic_config(url), revision)


def downgrade(url: str, revision: str) -> None:
    command.downgrade(alembic_config(url), revision)


def check(database: Database) -> None:
    """Raise DatabaseOutdated if migrations are missing, or DatabaseUnavailable."""
    revision = revision_of(database)
    if revision is None or revision < head():
        raise DatabaseOutdated(revision, head())


def revision_of(database: Database) -> str | None:
    """Return the revision of a database, or None if no migration has run on it."""
    with database.reading() as session:
        if not sa.inspect(session.connection()).has_table("alembic_version"):
            return None
        revision: str | None = session.scalar(sa.text("SELECT version_num FROM alembic_version"))
        return revision


@cache
def head() -> str:
    """Return the revision that this code expects."""
    revision = ScriptDirectory.from_config(alembic_config("")).get_current_head()
    assert revision is not None
    return revision


def _is_ahead(url: str) -> bool:
    database = Database(url)
    try:
        return (revision_of(database) or "") > head()
    finally:
        database.close()
