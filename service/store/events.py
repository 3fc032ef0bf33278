"""The event log: each event is appended in the transaction that caused it, and events are read in order.

Ids rise in the order in which events become visible, so a reader that has seen an id never misses a lower one.
SQLite has a single writer. On PostgreSQL a transaction inserts its events last, under an advisory lock that it keeps
until the commit. No transaction takes another lock after this one, so its holder never waits and cannot deadlock.
"""

from collections.abc import Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.store.database import at_commit, locked
from service.store.tables import Event

_PENDING = "pathswitch_events"

# Arbitrary, but different from the lock numbers of migrations (…101) and of artifacts in use (…103).
_ADVISORY_LOCK = 7_204_102

# Inserting into the table rather than the mapped class spares the round trip that would fetch the new ids.
_INSERT = sa.insert(cast(sa.Table, Event.__table__))


def append(session: Session, type_: str, **data: Any) -> None:
    """Record an event, e.g. ``append(session, "update.succeeded", update=id)``.

    The row is inserted at the end of the transaction, so rolling back a savepoint does not remove it.
    """
    if not session.info.get(_PENDING):
        session.info[_PENDING] = []
        at_commit(session, _write)
    session.info[_PENDING].append((type_, data))
    session.flush()


def page(session: Session, after: int, limit: int) -> Sequence[Event]:
    """Return up to ``limit`` events with ids above ``after``, oldest first."""
    return session.scalars(sa.select(Event).where(Event.id > after).order_by(Event.id).limit(limit)).all()


def latest(session: Session) -> int:
    """Return the id of the newest event, or 0 when there is none."""
    return session.scalar(sa.select(sa.func.max(Event.id))) or 0


def _write(session: Session) -> None:
    created_at = locked(session, _ADVISORY_LOCK)
    pending = session.info.pop(_PENDING)
    rows = [{"type": type_, "data": data, "created_at": created_at} for type_, data in pending]
    session.execute(_INSERT, rows)
