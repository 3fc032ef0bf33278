"""Requests under a key of their caller's: each is carried out once, and its answer is kept for a day.

A row is claimed before the request is carried out, under a lease that its process renews. Every transaction of the
request marks the row as carried out, and fails where the claim was lost meanwhile: a process that comes back from
the dead changes nothing. A claim whose lease ran out is taken over, unless the request was carried out and only
its answer is missing: then nobody may do it again.
"""

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.core.errors import Conflict
from service.store.database import now
from service.store.tables import IdempotentRequest

Statement = TypeVar("Statement", sa.Update, sa.Delete)

LEASE = timedelta(seconds=15)
KEPT = timedelta(hours=24)


class Standing(StrEnum):
    FREE = "free"
    OURS = "ours"
    IN_FLIGHT = "in_flight"
    ANSWERED = "answered"
    LOST = "lost"  # carried out by a process that died before it had kept the answer


@dataclass(frozen=True)
class Answer:
    """``request_sha256``: of the body that was answered."""

    request_sha256: str
    status: int
    media_type: str | None
    body: bytes


class Mark:
    """The guard of a request's transactions: each marks the row of its key as carried out, while the claim is ``owner``'s."""

    def __init__(self, key: str, owner: str) -> None:
        self._key, self._owner = key, owner
        self._marks = 0

    def __call__(self, session: Session) -> None:
        mark_carried_out(session, self._key, self._owner)
        self._marks += 1

    def forget(self) -> None:
        self._marks -= 1

    def was_committed(self, session: Session) -> bool:
        """Of a second transaction the row cannot tell: the first has marked it."""
        query = sa.select(IdempotentRequest.carried_out).where(
            IdempotentRequest.key == self._key, IdempotentRequest.owner == self._owner
        )
        return self._marks == 1 and bool(session.scalar(query.with_for_update()))


@dataclass(frozen=True)
class Seen:
    """``target`` is what the key was first used for. ``answer``: where the standing is ANSWERED."""

    standing: Standing
    target: str = ""
    answer: Answer | None = None


def look(session: Session, key: str) -> Seen:
    """What is known of a key. FREE: of nobody's, or to be taken over."""
    row = session.get(IdempotentRequest, key)
    present = now(session)
    if row is None or row.created_at + KEPT <= present:
        return Seen(Standing.FREE)
    if row.status is not None:
        assert row.request_sha256 is not None
        assert row.body is not None
        answer = Answer(row.request_sha256, row.status, row.media_type, row.body)
        return Seen(Standing.ANSWERED, row.target, answer)
    if row.lease_until > present:
        return Seen(Standing.IN_FLIGHT, row.target)
    return Seen(Standing.LOST if row.carried_out else Standing.FREE, row.target)


def claim(session: Session, key: str, target: str, owner: str) -> Seen:
    """Take the key, where it is free or the owner's: OURS then. Otherwise what is known of it."""
    present = now(session)
    session.execute(sa.delete(IdempotentRequest).where(IdempotentRequest.created_at <= present - KEPT))
    values = {
        "key": key,
        "target": target,
        "owner": owner,
        "lease_until": present + LEASE,
        "created_at": present,
        "carried_out": False,
    }
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    # Of two at once on PostgreSQL the later waits for the earlier, and then finds its row.
    insert = dialect.insert(IdempotentRequest).values(values).on_conflict_do_nothing()
    if session.scalar(insert.returning(IdempotentRequest.key)) is not None:
        return Seen(Standing.OURS, target)
    row = session.get(IdempotentRequest, key, with_for_update=True, populate_existing=True)
    if row is None:  # it was released while we waited: to be asked again
        return Seen(Standing.IN_FLIGHT, target)
    if row.owner == owner:  # by a claim whose answer was lost
        return Seen(Standing.OURS, target)
    seen = look(session, key)
    if seen.standing != Standing.FREE or seen.target != target:
        return seen
    row.owner, row.lease_until = owner, present + LEASE
    session.flush()
    return Seen(Standing.OURS, target)


def renew(session: Session, key: str, owner: str) -> None:
    session.execute(_own(sa.update(IdempotentRequest), key, owner).values(lease_until=now(session) + LEASE))


def mark_carried_out(session: Session, key: str, owner: str) -> None:
    """Raises Conflict where the claim is no longer the owner's."""
    done = session.execute(_own(sa.update(IdempotentRequest), key, owner).values(carried_out=True))
    if not done.rowcount:  # type: ignore[attr-defined]
        raise Conflict("the request was stalled, and another one with its Idempotency-Key has taken over")


def keep_answer(session: Session, key: str, owner: str, answer: Answer) -> None:
    """Unless the claim is no longer the owner's."""
    session.execute(
        _own(sa.update(IdempotentRequest), key, owner).values(
            request_sha256=answer.request_sha256,
            status=answer.status,
            media_type=answer.media_type,
            body=answer.body,
        )
    )


def release(session: Session, key: str, owner: str) -> None:
    """Forget a request that nothing came of."""
    session.execute(_own(sa.delete(IdempotentRequest), key, owner).where(~IdempotentRequest.carried_out))


def _own(statement: Statement, key: str, owner: str) -> Statement:
    return statement.where(
        IdempotentRequest.key == key, IdempotentRequest.owner == owner, IdempotentRequest.status.is_(None)
    )
