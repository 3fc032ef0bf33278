"""The database: one engine, one way to write, one way to read, and its clock.

``Database.transaction`` makes every commit of the project. On SQLite it begins IMMEDIATE, so that a
transaction that reads before it writes cannot fail half-way. ``reading`` begins deferred and rolls back, so
that reads never wait for writers. Both raise DatabaseUnavailable if the database does not respond, stays
locked, or has no space left.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any, TypeVar

import pysqlite3.dbapi2
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.orm import Session

from service.core.errors import DatabaseUnavailable

# PostgreSQL ends a transaction that is idle for longer. The locks of a process that was stopped or cut off
# in a transaction, and the stages it had claimed, would otherwise be held forever.
IDLE_SECONDS = 300

# How long to retry what should not fail because of a short outage, and the pauses between attempts. A
# restart of PostgreSQL takes a second or two.
RETRY_SECONDS = 5.0
_PAUSES = (0.05, 0.1, 0.2, 0.5)

_READ_ONLY = "pathswitch_read_only"
_AT_COMMIT = "pathswitch_at_commit"

_T = TypeVar("_T")


class Database:
    """A SQLite file or a PostgreSQL server, by URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = make_engine(url)
        # SQLite lets a second writer poll, with pauses of up to 100 ms and in no order. Writers of one
        # process queue here instead. Reentrant, because a lost answer is looked up inside its transaction.
        is_sqlite = self.engine.dialect.name == "sqlite"
        self.writer: AbstractContextManager[object] = threading.RLock() if is_sqlite else nullcontext()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A write transaction: commits at the end of the block, rolls back if the block raises."""
        with self._session(read_only=False) as session:
            yield session
            for write in session.info.pop(_AT_COMMIT, ()):
                write(session)
            self._commit(session)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One consistent snapshot to read from. Writes in the block are rolled back."""
        with self._session(read_only=True) as session:
            yield session

    def check(self) -> None:
        """Raise DatabaseUnavailable unless the database responds."""
        with self.reading() as session:
            session.execute(sa.text("SELECT 1"))

    def close(self) -> None:
        self.engine.dispose()

    def _commit(self, session: Session) -> None:
        session.commit()

    @contextmanager
    def _session(self, *, read_only: bool) -> Iterator[Session]:
        options: dict[str, Any] = {_READ_ONLY: read_only}
        if read_only and self.engine.dialect.name == "postgresql":
            options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        try:
            # With expire_on_commit, reading an attribute after the block would query a closed session.
            with (
                nullcontext() if read_only else self.writer,
                self.engine.connect().execution_options(**options) as connection,
                _discard_failed(connection),
                Session(connection, expire_on_commit=False, autoflush=False) as session,
            ):
                yield session
        except (exc.DBAPIError, exc.TimeoutError) as error:
            if not is_unavailable(error):
                raise
            raise DatabaseUnavailable from error


def retry_while_unavailable(function: Callable[[], _T]) -> _T:
    """Call an idempotent function, again for up to RETRY_SECONDS while it raises DatabaseUnavailable."""
    deadline = time.monotonic() + RETRY_SECONDS
    num_retries = 0
    while True:
        try:
            return function()
        except DatabaseUnavailable:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSES[min(num_retries, len(_PAUSES) - 1)])
        num_retries += 1


def at_commit(session: Session, write: Callable[[Session], None]) -> None:
    """Call ``write`` at the end of the transaction: for writes that must hold their lock only briefly."""
    session.info.setdefault(_AT_COMMIT, []).append(write)


def locked(session: Session, number: int, *, shared: bool = False) -> datetime:
    """Take an advisory lock until the end of the transaction; return the time at which it was acquired.

    On SQLite the single writer holds every lock already.
    """
    if session.get_bind().dialect.name != "postgresql":
        return now(session)
    function = "pg_advisory_xact_lock_shared" if shared else "pg_advisory_xact_lock"
    _, acquired_at = session.execute(sa.text(f"SELECT {function}({number}), clock_timestamp()")).one()
    return acquired_at.astimezone(UTC)  # type: ignore[no-any-return]


def now(session: Session) -> datetime:
    """The database's current time, in UTC. All leases and timestamps use this clock."""
    if session.get_bind().dialect.name == "postgresql":
        value: Any = session.scalar(sa.text("SELECT clock_timestamp()"))
        return value.astimezone(UTC)  # type: ignore[no-any-return]
    text = session.scalar(sa.text("SELECT strftime('%Y-%m-%dT%H:%M:%f', 'now')"))
    return datetime.fromisoformat(str(text)).replace(tzinfo=UTC)


def make_engine(url: str) -> Engine:
    """Create an engine. SQLite is the bundled one, because the system's may be too old."""
    if make_url(url).get_backend_name() != "sqlite":
        engine = sa.create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=20)
        event.listen(engine, "connect", _configure_postgres)
        return engine
    # SQLite 3.7.0 to 3.51.2 can corrupt a WAL database when several connections checkpoint at once.
    engine = sa.create_engine(url, module=pysqlite3.dbapi2, connect_args={"timeout": 60})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def _discard_failed(connection: Connection) -> Iterator[None]:
    """Keep a failed connection out of the pool: SQLAlchemy leaves its transaction open."""
    try:
        yield
    except exc.DBAPIError as error:
        if is_unavailable(error):
            connection.invalidate()
        raise


def is_unavailable(error: exc.DBAPIError | exc.TimeoutError) -> bool:
    """Whether the failure is temporary: the database could not do it, but the request itself is valid."""
    if isinstance(error, exc.TimeoutError):  # no pooled connection became free
        return True
    if error.connection_invalidated:
        return True
    # SQLite also raises OperationalError for wrong SQL, such as an unknown table.
    wrong_sql = getattr(error.orig, "sqlite_errorcode", None) == pysqlite3.dbapi2.SQLITE_ERROR
    return isinstance(error, exc.OperationalError | exc.InterfaceError) and not wrong_sql


def _configure_postgres(connection: Any, record: Any) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'")
    connection.commit()


def _configure_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # _begin_sqlite begins transactions
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
