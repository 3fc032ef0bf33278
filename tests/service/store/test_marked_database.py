"""A commit whose answer is lost: the mark of the request tells whether it was carried out."""

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.errors import Conflict, DatabaseUnavailable
from service.store import idempotency
from service.store.database import Database, at_commit
from service.store.idempotency import MarkedDatabase
from service.store.tables import IdempotentRequest

KEY, OWNER = "key", "owner"


@pytest.fixture
def marked(database: Database) -> MarkedDatabase:
    with database.transaction() as session:
        idempotency.claim(session, KEY, "POST /x", OWNER)
    return MarkedDatabase(database, KEY, OWNER)


def lose_next_answer(database: Database, *, done: bool) -> None:
    """The next commit, carried out or not, is reported as failed."""
    dialect: Any = database.engine.dialect
    commit, failure = dialect.do_commit, dialect.loaded_dbapi.OperationalError

    def do_commit(connection: Any) -> None:
        dialect.do_commit = commit
        if done:
            commit(connection)
        raise failure("the connection is gone")

    dialect.do_commit = do_commit


def write(database: Database, *, fails: bool = False) -> None:
    with database.transaction() as session:
        session.connection()
        if fails:
            at_commit(session, _fail)


def _fail(session: Session) -> None:
    raise ZeroDivisionError


def is_carried_out(database: Database) -> bool:
    with database.reading() as session:
        return bool(session.scalar(sa.select(IdempotentRequest.carried_out)))


@pytest.mark.parametrize("done", [True, False])
def test_a_commit_fails_only_if_it_was_not_carried_out(
    database: Database, marked: MarkedDatabase, done: bool
) -> None:
    lose_next_answer(database, done=done)
    if done:
        write(marked)
    else:
        with pytest.raises(DatabaseUnavailable):
            write(marked)
    assert is_carried_out(database) is done


def test_a_transaction_that_fails_before_its_commit_leaves_no_mark(
    database: Database, marked: MarkedDatabase
) -> None:
    with pytest.raises(ZeroDivisionError):
        write(marked, fails=True)
    assert not is_carried_out(database)
    lose_next_answer(database, done=True)
    write(marked)
    assert is_carried_out(database)


def test_the_mark_tells_nothing_about_a_second_transaction(
    database: Database, marked: MarkedDatabase
) -> None:
    write(marked)
    lose_next_answer(database, done=True)
    with pytest.raises(DatabaseUnavailable):
        write(marked)


def test_transactions_of_the_unmarked_database_leave_no_mark(
    database: Database, marked: MarkedDatabase
) -> None:
    write(database)
    assert not is_carried_out(database)


def test_a_request_that_lost_its_claim_cannot_commit(database: Database) -> None:
    with pytest.raises(Conflict):
        write(MarkedDatabase(database, KEY, "another owner"))
