"""Migrations create exactly the expected tables, can be reverted, keep all rows, and run once."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory

from service.store.base import Base
from service.store.database import Database
from service.store.migrate import alembic_config, downgrade, head, revision_of, upgrade
from tests.support.rows import fill

Rows = dict[str, Sequence[dict[str, Any]]]


def revisions() -> list[str]:
    """All revisions, from the first to the head."""
    scripts = ScriptDirectory.from_config(alembic_config("")).walk_revisions()
    return [script.revision for script in scripts][::-1]


def schema_of(database: Database) -> sa.MetaData:
    """The current tables, without Alembic's own."""
    schema = sa.MetaData()
    schema.reflect(database.engine)
    schema.remove(schema.tables["alembic_version"])
    database.close()  # its connections have prepared statements for the current tables
    return schema


def rows_of(database: Database, schema: sa.MetaData) -> Rows:
    with database.reading() as session:
        return {
            table.name: [
                dict(row)
                for row in session.execute(sa.select(table).order_by(*table.primary_key)).mappings().all()
            ]
            for table in schema.sorted_tables
        }


def filled(database: Database) -> Rows:
    """Add rows to every table of the newest revision. Returns them."""
    with database.transaction() as session:
        fill(session)
    rows = rows_of(database, schema_of(database))
    assert rows.keys() == Base.metadata.tables.keys()
    assert all(rows.values()), "a table has no rows: add some in tests/support/rows.py"
    return rows


def common(rows: Rows, other: Rows) -> Rows:
    """``rows``, limited to the tables and columns that ``other`` has too."""
    return {
        table: [{name: row[name] for name in row.keys() & other[table][0].keys()} for row in rows[table]]
        for table in rows.keys() & other.keys()
    }


def test_the_migrations_create_the_declared_tables(database: Database) -> None:
    command.check(alembic_config(database.url))


def test_all_migrations_can_be_reverted_and_repeated(database: Database) -> None:
    database.close()
    downgrade(database.url, "base")
    assert set(sa.inspect(database.engine).get_table_names()) <= {"alembic_version"}
    upgrade(database.url)
    assert "stages" in sa.inspect(database.engine).get_table_names()


def test_revisions_are_numbered_consecutively() -> None:
    assert revisions() == [f"{number:04d}" for number in range(1, len(revisions()) + 1)]


def test_rows_survive_every_downgrade_and_upgrade(database: Database) -> None:
    before = filled(database)
    for revision in [*revisions()[-2::-1], *revisions()[1:]]:
        database.close()
        (downgrade if revision < str(revision_of(database)) else upgrade)(database.url, revision)
        after = rows_of(database, schema_of(database))
        assert common(before, after) == common(after, before)
        assert before.keys() <= after.keys() or after.keys() <= before.keys()
        before = after
    assert revision_of(database) == head()
    command.check(alembic_config(database.url))


def test_a_migration_with_dangling_rows_fails_and_changes_nothing(sqlite: Database) -> None:
    filled(sqlite)
    with sqlite.engine.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
        raw.execute("PRAGMA foreign_keys = OFF")
        raw.execute("UPDATE metric_points SET stage_id = 'nobody'")
    sqlite.close()
    with pytest.raises(AssertionError, match="dangling foreign keys"):
        downgrade(sqlite.url, revisions()[0])
    assert revision_of(sqlite) == head()


def test_concurrent_upgrades_take_turns(database: Database) -> None:
    filled(database)
    database.close()
    downgrade(database.url, revisions()[0])
    # Separate processes, because Alembic runs one migration at a time per process.
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "api.cli.main", "db", "upgrade"],
            env=os.environ | {"PATHSWITCH_DATABASE_URL": database.url},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in commands:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    assert revision_of(database) == head()


@pytest.mark.slow
@pytest.mark.postgres
def test_an_upgrade_waits_ten_seconds_for_a_table_in_use(postgres_url: str) -> None:
    """While it waits for a table lock, all later queries on that table wait behind it."""
    upgrade(postgres_url, revisions()[0])
    database = Database(postgres_url)
    with database.transaction() as session:
        session.execute(sa.text("LOCK TABLE updates, data_versions IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            upgrade(postgres_url)
    assert revision_of(database) == revisions()[0]
    upgrade(postgres_url)
    assert revision_of(database) == head()
    database.close()
