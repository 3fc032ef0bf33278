"""Column types and ids that mean the same on SQLite and on PostgreSQL."""

import secrets
import threading
import time
from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect

_RANDOM_BITS = 64


class _Ids:
    """Increasing 112-bit numbers: 48 bits of Unix time in ms, then 64 random bits. Robust to clocks set back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self) -> int:
        now = (time.time_ns() // 1_000_000 << _RANDOM_BITS) | secrets.randbits(_RANDOM_BITS)
        with self._lock:
            if now >> _RANDOM_BITS <= self._last >> _RANDOM_BITS:
                now = self._last + 1 + secrets.randbits(_RANDOM_BITS // 2)
            self._last = now
            return now


_ids = _Ids()


def new_id(prefix: str) -> str:
    """Return an opaque id: prefix, 48 bits of time, 64 random bits.

    Ids sort by creation: always within a process, and to the millisecond of their clocks between processes.
    """
    return f"{prefix}_{_ids.next():028x}"


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """An aware UTC datetime: timestamptz on PostgreSQL; on SQLite text of fixed width, which compares in time order."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name == "postgresql":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Json = sa.JSON().with_variant(JSONB(), "postgresql")
