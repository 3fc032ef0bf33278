"""Alembic's environment: runs migrations on the service's own engine, one upgrade at a time, with a limit on lock waits."""

from typing import Any

import sqlalchemy as sa
from alembic import context
from alembic.autogenerate.api import AutogenContext

from service.store.columns import UtcDateTime
from service.store.database import make_engine
from service.store.tables import Base

# Arbitrary number of the advisory lock that makes concurrent upgrades take turns.
_ADVISORY_LOCK = 7_204_101


def render_item(kind: str, item: Any, autogen: AutogenContext) -> str | bool:
    """Render plain SQLAlchemy types, so that revisions do not change when the project's own types do."""
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
            # SQLite alters a table by replacing it, which foreign keys would forbid. Only possible outside a transaction.
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
                assert not dangling, f"dangling foreign keys: {dangling[:5]}"
finally:
    engine.dispose()
