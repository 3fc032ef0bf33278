"""Requests under an Idempotency-Key: each is carried out once, and its answer is kept for a day.

The process that handles a request first claims the key's row under a lease, which it renews. Every
transaction of the request marks the row as carried out, and fails if another process has taken over the
claim, so a stalled process changes nothing. A claim with an expired lease can be taken over unless the
row is marked: then the request was carried out and only its answer is missing, so it must not be carried out
again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.orm import Session

from service.core.errors import Conflict
from service.store.database import Database, is_unavailable, now, retry_while_unavailable
from service.store.tables import IdempotentRequest

Statement = TypeVar("Statement", sa.Update, sa.Delete)

LEASE = timedelta(seconds=15)
KEPT = timedelta(hours=24)


class KeyState(StrEnum):
    FREE = "free"
    """Unused, or the claim has expired and can be taken over."""

    OURS = "ours"
    """Claimed by the caller."""

    IN_FLIGHT = "in_flight"
    """Claimed by another request, whose lease is valid."""

    ANSWERED = "answered"
    """Carried out, and the answer is kept."""

    LOST = "lost"
    """Carried out, but the process died before it kept the answer."""


@dataclass(frozen=True)
class Answer:
    """A kept answer. ``request_sha256`` is the hash of the request's body."""

    request_sha256: str
    status: int
    media_type: str | None
    body: bytes


@dataclass(frozen=True)
class KeyStatus:
    """State of a key, and the target that it was first used for. ``answer`` is set if ANSWERED."""

    state: KeyState
    target: str = ""
    answer: Answer | None = None


class MarkedDatabase(Database):
    """The database as one request sees it: each transaction marks the row of the request's key.

    If the response to a COMMIT is lost, the mark shows whether the transaction was committed. That works only
    for the first commit, because later ones find the row already marked.
    """

    def __init__(self, database: Database, key: str, owner: str) -> None:
        self.url, self.engine, self.writer = database.url, database.engine, database.writer
        self._key, self._owner = key, owner
        self._has_tried_commit = False

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Like ``Database.transaction``, but raises Conflict, and commits nothing, if the claim was taken over."""
        with super().transaction() as session:
            yield session
            mark_carried_out(session, self._key, self._owner)

    def _commit(self, session: Session) -> None:
        is_first, self._has_tried_commit = not self._has_tried_commit, True
        try:
            session.commit()
        except exc.DBAPIError as error:
            if not (is_first and is_unavailable(error) and self._was_committed(session)):
                raise

    def _was_committed(self, session: Session) -> bool:
        connection = session.get_bind()
        assert isinstance(connection, Connection)
        connection.invalidate()  # rolls back a transaction that is not committed, and releases its locks
        return retry_while_unavailable(self._is_marked)

    def _is_marked(self) -> bool:
        query = sa.select(IdempotentRequest.carried_out).where(
            IdempotentRequest.key == self._key, IdempotentRequest.owner == self._owner
        )
        # In a write transaction, because that waits for a COMMIT that is still under way.
        with self._session(read_only=False) as session:
            return bool(session.scalar(query.with_for_update()))


def look_up(session: Session, key: str) -> KeyStatus:
    row = session.get(IdempotentRequest, key)
    current = now(session)
    if row is None or row.created_at + KEPT <= current:
        return KeyStatus(KeyState.FREE)
    if row.status is not None:
        assert row.request_sha256 is not None
        assert row.body is not None
        answer = Answer(row.request_sha256, row.status, row.media_type, row.body)
        return KeyStatus(KeyState.ANSWERED, row.target, answer)
    if row.lease_until > current:
        return KeyStatus(KeyState.IN_FLIGHT, row.target)
    return KeyStatus(KeyState.LOST if row.carried_out else KeyState.FREE, row.target)


def claim(session: Session, key: str, target: str, owner: str) -> KeyStatus:
    """Claim the key if it is free or already the owner's, which gives OURS. Otherwise return its status."""
    current = now(session)
    session.execute(sa.delete(IdempotentRequest).where(IdempotentRequest.created_at <= current - KEPT))
    values = {
        "key": key,
        "target": target,
        "owner": owner,
        "lease_until": current + LEASE,
        "created_at": current,
        "carried_out": False,
    }
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    # On PostgreSQL, the second of two concurrent inserts waits for the first one, and then finds its row.
    insert = dialect.insert(IdempotentRequest).values(values).on_conflict_do_nothing()
    if session.scalar(insert.returning(IdempotentRequest.key)) is not None:
        return KeyStatus(KeyState.OURS, target)
    row = session.get(IdempotentRequest, key, with_for_update=True, populate_existing=True)
    if row is None:  # released since the insert; the caller asks again
        return KeyStatus(KeyState.IN_FLIGHT, target)
    if row.owner == owner:  # an earlier claim was committed, but its answer was lost
        return KeyStatus(KeyState.OURS, target)
    status = look_up(session, key)
    if status.state != KeyState.FREE or status.target != target:
        return status
    row.owner, row.lease_until = owner, current + LEASE
    session.flush()
    return KeyStatus(KeyState.OURS, target)


def renew(session: Session, key: str, owner: str) -> None:
    """Extend the lease of the owner's claim."""
    session.execute(_own(sa.update(IdempotentRequest), key, owner).values(lease_until=now(session) + LEASE))


def mark_carried_out(session: Session, key: str, owner: str) -> None:
    """Raises Conflict if the claim is no longer the owner's."""
    done = session.execute(_own(sa.update(IdempotentRequest), key, owner).values(carried_out=True))
    if not done.rowcount:  # type: ignore[attr-defined]
        raise Conflict("the request stalled, and another one with the same Idempotency-Key has taken over")


def keep_answer(session: Session, key: str, owner: str, answer: Answer) -> None:
    """Store the answer, unless the claim is no longer the owner's."""
    session.execute(
        _own(sa.update(IdempotentRequest), key, owner).values(
            request_sha256=answer.request_sha256,
            status=answer.status,
            media_type=answer.media_type,
            body=answer.body,
        )
    )


def release(session: Session, key: str, owner: str) -> None:
    """Free the key of a request that changed nothing."""
    session.execute(_own(sa.delete(IdempotentRequest), key, owner).where(~IdempotentRequest.carried_out))


def _own(statement: Statement, key: str, owner: str) -> Statement:
    return statement.where(
        IdempotentRequest.key == key, IdempotentRequest.owner == owner, IdempotentRequest.status.is_(None)
    )
