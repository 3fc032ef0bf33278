"""Events become visible in the order of their ids."""

import threading

import pytest

from service.store import events
from service.store.database import Database


def test_events_are_read_in_the_order_of_appending(database: Database) -> None:
    with database.transaction() as session:
        for number in range(3):
            events.append(session, "counted", number=number)
    with database.transaction() as session:
        events.append(session, "counted", number=3)
    with database.reading() as session:
        rows = events.page(session, 0, 10)
        assert [row.data["number"] for row in rows] == [0, 1, 2, 3]
        assert [row.id for row in rows] == sorted(row.id for row in rows)
        assert events.latest(session) == rows[-1].id
        assert [row.id for row in events.page(session, rows[1].id, 1)] == [rows[2].id]


def test_a_failed_transaction_leaves_no_events(database: Database) -> None:
    def fail() -> None:
        with database.transaction() as session:
            events.append(session, "never")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with database.reading() as session:
        assert events.latest(session) == 0


@pytest.mark.postgres
@pytest.mark.parametrize("databases", ["postgresql"], indirect=True)
def test_the_transaction_that_commits_later_gets_the_higher_id(database: Database) -> None:
    """Otherwise a reader that has seen the higher id would miss the lower one."""
    appended, may_commit = threading.Event(), threading.Event()

    def slow() -> None:
        with database.transaction() as session:
            events.append(session, "slow")
            appended.set()
            assert may_commit.wait(30)

    thread = threading.Thread(target=slow)
    thread.start()
    assert appended.wait(30)
    with database.transaction() as session:
        events.append(session, "fast")
    with database.reading() as session:
        assert [row.type for row in events.page(session, 0, 10)] == ["fast"]
    may_commit.set()
    thread.join()
    with database.reading() as session:
        assert [row.type for row in events.page(session, 0, 10)] == ["fast", "slow"]


def test_a_reading_session_sees_one_snapshot(database: Database) -> None:
    with database.reading() as session:
        assert events.latest(session) == 0
        with database.transaction() as other:
            events.append(other, "meanwhile")
        assert events.latest(session) == 0
