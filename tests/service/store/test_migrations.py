"""Migrations make exactly the tables that the code expects, go back, keep the rows, and are carried out once."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.script import ScriptDirectory

from service.store.database import Database
from service.store.migrate import alembic_config, downgrade, head, revision_of, upgrade
from service.store.tables import Base
from tests.support.rows import fill

Rows = dict[str, Sequence[dict[str, Any]]]


def revisions() -> list[str]:
    """From the first to the head."""
    scripts = ScriptDirectory.from_config(alembic_config("")).walk_revisions()
    return [script.revision for script in scripts][::-1]


def schema_of(database: Database) -> sa.MetaData:
    """The tables as they are now, without Alembic's own."""
    schema = sa.MetaData()
    schema.reflect(database.engine)
    schema.remove(schema.tables["alembic_version"])
    database.close()  # what is prepared on its connections is for the tables as they are
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
    """Put rows into every table of the newest revision; what they are."""
    with database.transaction() as session:
        fill(session)
    rows = rows_of(database, schema_of(database))
    assert rows.keys() == Base.metadata.tables.keys()
    assert all(rows.values()), "a table without rows: tests/support/rows.py"
    return rows


def common(rows: Rows, other: Rows) -> Rows:
    """``rows`` in those tables and columns that ``other`` has too."""
    return {
        table: [{name: row[name] for name in row.keys() & other[table][0].keys()} for row in rows[table]]
        for table in rows.keys() & other.keys()
    }


def test_the_tables_and_the_migrations_agree(database):
    command.check(alembic_config(database.url))


def test_down_to_nothing_and_up_again(database):
    database.close()
    downgrade(database.url, "base")
    assert set(sa.inspect(database.engine).get_table_names()) <= {"alembic_version"}
    upgrade(database.url)
    assert "stages" in sa.inspect(database.engine).get_table_names()


def test_revisions_are_numbered_one_after_another():
    assert revisions() == [f"{number:04d}" for number in range(1, len(revisions()) + 1)]


def test_rows_survive_every_revision_down_and_up(database):
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


def test_rows_that_a_migration_would_leave_dangling_are_told_and_nothing_is_changed(sqlite):
    filled(sqlite)
    with sqlite.engine.connect() as connection:
        raw: Any = connection.connection.dbapi_connection
        raw.execute("PRAGMA foreign_keys = OFF")
        raw.execute("UPDATE metric_points SET stage_id = 'nobody'")
    sqlite.close()
    with pytest.raises(AssertionError, match="dangling foreign keys"):
        downgrade(sqlite.url, revisions()[0])
    assert revision_of(sqlite) == head()


def test_upgrades_at_once_take_turns(database):
    filled(database)
    database.close()
    downgrade(database.url, revisions()[0])
    # Processes: Alembic has one migration at a time in each.
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
def test_an_upgrade_waits_ten_seconds_for_a_table_in_use(postgres_url):
    """Whoever waits for a lock on a table has all others wait behind it."""
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
