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


url = context.config.get_main_option("sqlalchemy.url")
assert url is not None
engine = make_engine(url)
with engine.connect() as connection:
    postgresql = connection.dialect.name == "postgresql"
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=not postgresql,
        compare_type=True,
        render_item=render_item,
    )
    with context.begin_transaction():
        if postgresql:
            connection.execute(sa.text("SET LOCAL lock_timeout = '10s'"))
            connection.execute(sa.text(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"))
        context.run_migrations()
engine.dispose()
