"""What happened, appended in the transaction that made it happen, read in order.

Ids rise in the order in which events become visible: a reader that has seen an id never misses a lower one.
SQLite has one writer at a time anyway; on PostgreSQL the rows are written last in their transaction, under a
lock that is kept until the commit. It is the last lock that a transaction takes, so that its holder waits for
nobody.
"""

from collections.abc import Sequence
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.store.database import at_commit, locked
from service.store.tables import Event

_PENDING = "pathswitch_events"

# Any fixed number but the one that migrations lock.
_ADVISORY_LOCK = 7_204_102

# Of the table and not of the class: nobody needs the ids, which would have to be asked for.
_INSERT = sa.insert(cast(sa.Table, Event.__table__))


def append(session: Session, type_: str, **data: Any) -> None:
    """Record an event, e.g. ``append(session, "update.succeeded", update=id)``.

    It is kept until the end of the transaction: a savepoint that is rolled back does not take it along.
    """
    if not session.info.get(_PENDING):
        session.info[_PENDING] = []
        at_commit(session, _write)
    session.info[_PENDING].append((type_, data))
    session.flush()


def page(session: Session, after: int, limit: int) -> Sequence[Event]:
    """Up to ``limit`` events with ids above ``after``, oldest first."""
    return session.scalars(sa.select(Event).where(Event.id > after).order_by(Event.id).limit(limit)).all()


def latest(session: Session) -> int:
    """Id of the newest event; 0 where nothing has happened yet."""
    return session.scalar(sa.select(sa.func.max(Event.id))) or 0


def _write(session: Session) -> None:
    present = locked(session, _ADVISORY_LOCK)
    pending = session.info.pop(_PENDING)
    rows = [{"type": type_, "data": data, "created_at": present} for type_, data in pending]
    session.execute(_INSERT, rows)
