"""A commit with a lost reply: the mark of the request tells whether it was carried out."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.errors import DatabaseAway
from service.store import idempotency
from service.store.database import Database, at_commit, commit_guard
from service.store.idempotency import Mark
from service.store.tables import IdempotentRequest

KEY, OWNER = "key", "owner"


@pytest.fixture
def mark(database: Database) -> Mark:
    with database.transaction() as session:
        idempotency.claim(session, KEY, "POST /x", OWNER)
    return Mark(KEY, OWNER)


def lose_answers(database: Database, *, done: bool) -> None:
    """Make the next commit report a failure, whether it is carried out or not."""
    dialect: Any = database.engine.dialect
    commit, failure = dialect.do_commit, dialect.loaded_dbapi.OperationalError

    def do_commit(connection: Any) -> None:
        dialect.do_commit = commit
        if done:
            commit(connection)
        raise failure("the connection is gone")

    dialect.do_commit = do_commit


def act(database: Database, mark: Mark, *, fails: bool = False) -> None:
    token = commit_guard.set(mark)
    try:
        with database.transaction() as session:
            session.connection()
            if fails:
                at_commit(session, _fail)
    finally:
        commit_guard.reset(token)


def _fail(session: Session) -> None:
    raise ZeroDivisionError


def carried_out(database: Database) -> bool:
    with database.reading() as session:
        return bool(session.scalar(sa.select(IdempotentRequest.carried_out)))


@pytest.mark.parametrize("done", [True, False])
def test_a_lost_reply_fails_only_if_the_commit_was_not_carried_out(
    database: Database, mark: Mark, done: bool
) -> None:
    lose_answers(database, done=done)
    if done:
        act(database, mark)
    else:
        with pytest.raises(DatabaseAway):
            act(database, mark)
    assert carried_out(database) is done


def test_a_transaction_that_fails_after_its_mark_does_not_count(database: Database, mark: Mark) -> None:
    with pytest.raises(ZeroDivisionError):
        act(database, mark, fails=True)
    lose_answers(database, done=True)
    act(database, mark)
    assert carried_out(database)


def test_the_mark_of_one_transaction_does_not_cover_the_next(database: Database, mark: Mark) -> None:
    act(database, mark)
    lose_answers(database, done=True)
    with pytest.raises(DatabaseAway):
        act(database, mark)
