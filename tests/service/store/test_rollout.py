"""Two releases of the code on one database: a migration must not break the code before it.

During a rolling upgrade, processes of the previous release continue on the migrated database. A revision may therefore
add to the schema, but must not remove, rename or narrow what the previous release uses.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.engine import Connection

from service.core.errors import DatabaseBehind
from service.store.database import Database
from service.store.migrate import check, downgrade, head, revision_of, upgrade
from tests.service.store.test_migrations import Rows, filled, revisions, rows_of, schema_of

# Intended removals by revision. They are the second half of a change over two releases: the previous release no longer
# uses what they remove.
CONTRACTED: dict[str, set[str]] = {}

# (old type, new type) where the new type holds every value of the old one.
WIDER = {("INTEGER", "BIGINT"), ("FLOAT", "DOUBLE PRECISION")}


def breaches(connection: Connection, old: sa.MetaData, rows: Rows) -> set[str]:
    """What code for the tables ``old`` with ``rows`` can no longer do. Rolls everything back."""
    new = sa.MetaData()
    new.reflect(connection)
    missing = {table for table in old.tables if table not in new.tables}
    found = {f"{table} is gone" for table in missing}
    for table in old.sorted_tables:
        if table.name not in missing:
            found |= set(_narrowed(connection, table, new.tables[table.name]))
    if not found:
        found |= _rejected(connection, old, rows)
    connection.rollback()
    return found


def _narrowed(connection: Connection, old: sa.Table, new: sa.Table) -> Iterator[str]:
    for column in old.columns:
        name = f"{old.name}.{column.name}"
        if column.name not in new.columns:
            yield f"{name} is gone"
            continue
        now = new.columns[column.name]
        types = str(column.type.compile(connection.dialect)), str(now.type.compile(connection.dialect))
        if types[0] != types[1] and types not in WIDER:
            yield f"{name} is {types[1]}"
        if column.nullable and not now.nullable:
            yield f"{name} is required"
    for column in new.columns:
        if column.name not in old.columns and not column.nullable and column.server_default is None:
            yield f"{old.name}.{column.name} is required"
    for columns in _unique(new) - _unique(old):
        if columns <= set(old.columns.keys()):
            yield f"{old.name}: {', '.join(sorted(columns))} must be unique"
    for text in _checks(new) - _checks(old):
        if not any(name in text for name in set(new.columns.keys()) - set(old.columns.keys())):
            yield f"{old.name}: {text}"


def _unique(table: sa.Table) -> set[frozenset[str]]:
    constraints = [each for each in table.constraints if isinstance(each, sa.UniqueConstraint)]
    indexes = [index for index in table.indexes if index.unique]
    columns = [constraint.columns for constraint in constraints] + [index.columns for index in indexes]
    return {frozenset(each.keys()) for each in columns}


def _checks(table: sa.Table) -> set[str]:
    return {str(each.sqltext) for each in table.constraints if isinstance(each, sa.CheckConstraint)}


def _rejected(connection: Connection, old: sa.MetaData, rows: Rows) -> set[str]:
    """Read, update, delete and insert all rows of every table, as the old code does."""
    try:
        for table in reversed(old.sorted_tables):
            connection.execute(sa.select(table)).all()
            changes = {column: column for column in table.columns}
            connection.execute(sa.update(table).values(changes))
        for table in reversed(old.sorted_tables):
            connection.execute(sa.delete(table))
        for table in old.sorted_tables:
            connection.execute(sa.insert(table), rows[table.name])
    except sa.exc.DBAPIError as error:
        return {str(error.orig)}
    return set()


def test_no_revision_breaks_the_code_before_it(database: Database) -> None:
    filled(database)
    schemas: dict[str, tuple[sa.MetaData, Rows]] = {}
    for revision in revisions()[-2::-1]:
        database.close()
        downgrade(database.url, revision)
        schema = schema_of(database)
        schemas[revision] = schema, rows_of(database, schema)
    for before, revision in zip(revisions(), revisions()[1:], strict=False):
        database.close()
        upgrade(database.url, revision)
        with database.engine.connect() as connection:
            found = breaches(connection, *schemas[before])
        assert found == CONTRACTED.get(revision, set()), (
            f"revision {revision} breaks the code of revision {before}"
        )


Change = Callable[[Operations], object]


def _required(op: Operations) -> None:
    """Add a required column to a table that has rows."""
    op.add_column("releases", sa.Column("who", sa.String(), nullable=True))
    op.execute("UPDATE releases SET who = 'x'")
    with op.batch_alter_table("releases") as table:
        table.alter_column("who", nullable=False)


def _altered(**changes: Any) -> Change:
    def change(op: Operations) -> None:
        with op.batch_alter_table("releases") as table:
            table.alter_column("error", **changes)

    return change


def _stricter(op: Operations) -> None:
    with op.batch_alter_table("releases") as table:
        table.create_check_constraint("by", "by <> 'nobody'")


def _related(op: Operations) -> None:
    """Add a CHECK that new code satisfies, but the old code's rows do not."""
    op.add_column("releases", sa.Column("who", sa.String(), nullable=True))
    op.execute("UPDATE releases SET who = by")
    with op.batch_alter_table("releases") as table:
        table.create_check_constraint("who", "(who IS NULL) = (by IS NULL)")


@pytest.mark.parametrize(
    ("change", "breach"),
    [
        (lambda op: op.drop_column("releases", "reason"), "releases.reason is gone"),
        (_altered(new_column_name="problem"), "releases.error is gone"),
        (lambda op: op.rename_table("metric_points", "points"), "metric_points is gone"),
        (_required, "releases.who is required"),
        (lambda op: (op.execute("UPDATE releases SET error = ''"), _altered(nullable=False)(op)), "releases.error is required"),
        (_altered(type_=sa.String(20)), "releases.error is VARCHAR(20)"),
        (lambda op: op.create_index("uq_releases", "releases", ["reason"], unique=True), "releases: reason must be unique"),
        (_stricter, "by <> 'nobody'"),
        (_related, ""),
    ],
)  # fmt: skip
def test_a_revision_that_breaks_the_code_before_it_is_found(
    database: Database, change: Change, breach: str
) -> None:
    rows = filled(database)
    old = schema_of(database)
    with database.engine.connect() as connection:
        change(Operations(MigrationContext.configure(connection)))
        connection.commit()
        found = breaches(connection, old, rows)
    assert len(found) == 1
    assert breach in found.pop().replace("::text", "")


def _additions(op: Operations) -> None:
    op.add_column("releases", sa.Column("who", sa.String(), nullable=True))
    op.add_column("updates", sa.Column("urgent", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table("notes", sa.Column("id", sa.String(), primary_key=True))
    op.create_index("ix_releases_by", "releases", ["by"])
    op.create_index("uq_releases_who", "releases", ["who"], unique=True)


def test_additions_do_not_break_the_old_code(database: Database) -> None:
    rows = filled(database)
    old = schema_of(database)
    with database.engine.connect() as connection:
        _additions(Operations(MigrationContext.configure(connection)))
        connection.commit()
        assert breaches(connection, old, rows) == set()


def test_an_empty_database_is_behind(sqlite: Database, tmp_path: Path) -> None:
    empty = Database(f"sqlite:///{tmp_path}/empty.db")
    with pytest.raises(DatabaseBehind, match="the database has no Pathswitch tables"):
        check(empty)
    empty.close()
    sqlite.close()
    downgrade(sqlite.url, "base")
    with pytest.raises(DatabaseBehind, match="the database has no Pathswitch tables"):
        check(sqlite)


def test_a_database_that_is_ahead_is_left_unchanged(database: Database) -> None:
    with database.transaction() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    check(database)
    upgrade(database.url)
    assert revision_of(database) == "9999"


def test_the_error_for_an_old_database_says_how_to_upgrade(database: Database) -> None:
    database.close()
    downgrade(database.url, revisions()[-2])
    reason = f"at revision {revisions()[-2]}, and this version needs {head()}: run `pathswitch db upgrade`"
    with pytest.raises(DatabaseBehind, match=reason):
        check(database)
