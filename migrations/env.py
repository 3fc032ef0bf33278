"""Alembic's environment: migrations run on the engine that the service runs on, one at a time, without waiting for ever."""

from typing import Any

import sqlalchemy as sa
from alembic import context
from alembic.autogenerate.api import AutogenContext

from service.store.columns import UtcDateTime
from service.store.database import make_engine
from service.store.tables import Base

# Any fixed number: two upgrades at once take turns on it.
_ADVISORY_LOCK = 7_204_101


def render_item(kind: str, item: Any, autogen: AutogenContext) -> str | bool:
    """Write plain SQLAlchemy types into revisions: they must not change when the project's own types do."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and isinstance(item, sa.JSON):
        autogen.imports.add("from sqlalchemy.dialects import postgresql")
        return 'sa.JSON().with_variant(postgresql.JSONB(), "postgresql")'
    return False


applied: list[object] = []

url = context.config.get_main_option("sqlalchemy.url")
assert url is not None
engine = make_engine(url)
try:
    with engine.connect() as connection:
        postgresql = connection.dialect.name == "postgresql"
        if not postgresql:
            # A table is altered by dropping it for another, which rows that refer to it would forbid. Not in a transaction yet.
            connection.connection.driver_connection.execute("PRAGMA foreign_keys = OFF")
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            render_as_batch=not postgresql,
            compare_type=True,
            render_item=render_item,
            on_version_apply=lambda **details: applied.append(details),
            transactional_ddl=True,  # on SQLite too, where BEGIN IMMEDIATE is the lock
        )
        with context.begin_transaction():
            if postgresql:
                connection.execute(sa.text("SET LOCAL lock_timeout = '10s'"))
                connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
            context.run_migrations()
            if applied and not postgresql:
                dangling = connection.execute(sa.text("PRAGMA foreign_key_check")).all()
                assert not dangling, f"rows that refer to nothing: {dangling[:5]}"
finally:
    engine.dispose()
