"""What happened, appended in the transaction that made it happen, read in order."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.store.database import now
from service.store.tables import Event


def append(session: Session, type_: str, **data: Any) -> None:
    """Record an event, e.g. ``append(session, "update.succeeded", update=id)``."""
    session.add(Event(type=type_, data=data, created_at=now(session)))
    session.flush()


def page(session: Session, after: int, limit: int) -> Sequence[Event]:
    """Up to ``limit`` events with ids above ``after``, oldest first."""
    return session.scalars(sa.select(Event).where(Event.id > after).order_by(Event.id).limit(limit)).all()
