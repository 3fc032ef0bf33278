"""The database: one engine, one way to write, one way to read, and its clock.

``transaction()`` is the only commit in the project. On SQLite it begins IMMEDIATE, so that a reader that
becomes a writer cannot fail half-way; ``reading()`` begins deferred and rolls back, so that reads never wait
for writers. Where the database is not there, is locked for too long or has no room left, both raise DatabaseAway.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

import pysqlite3.dbapi2
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.orm import Session

from service.core.errors import DatabaseAway

# After which PostgreSQL ends a transaction in which nothing is asked any more: whoever was stopped or cut off in it would
# keep its locks, and with them the stages that it held, for good.
IDLE_SECONDS = 300

# How long is asked again for what must not end as not known, and in which steps: a restart of PostgreSQL takes a second or two.
PATIENCE_SECONDS = 5.0
_PAUSES = (0.05, 0.1, 0.2, 0.5)

_READ_ONLY = "pathswitch_read_only"
_AT_COMMIT = "pathswitch_at_commit"

_T = TypeVar("_T")


class CommitGuard(Protocol):
    """What whoever runs a request adds to each of its transactions."""

    def __call__(self, session: Session) -> None:
        """Write a mark in the transaction. Raises where the transaction must not be."""
        ...

    def forget(self) -> None:
        """The transaction that was marked last is not committed, and never will be."""
        ...

    def was_committed(self, session: Session) -> bool:
        """Whether the transaction that was marked last is known, in another one, to be committed."""
        ...


commit_guard: ContextVar[CommitGuard | None] = ContextVar("commit_guard", default=None)


class Database:
    """A SQLite file or a PostgreSQL server, by URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = make_engine(url)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """One write transaction: commits at the end of the block, rolls back if it raises."""
        with self._session(read_only=False) as session:
            yield session
            if (guard := commit_guard.get()) is not None:
                guard(session)
            try:
                for write in session.info.pop(_AT_COMMIT, ()):
                    write(session)
                self._commit(session, guard)
            except DatabaseAway:
                raise  # from asking what became of the commit: nobody knows
            except BaseException:
                if guard is not None:
                    guard.forget()
                raise

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One consistent snapshot to read from. Nothing done in it is kept."""
        with self._session(read_only=True) as session:
            yield session

    def check(self) -> None:
        """Raise DatabaseAway unless the database answers."""
        with self.reading() as session:
            session.execute(sa.text("SELECT 1"))

    def close(self) -> None:
        self.engine.dispose()

    def _commit(self, session: Session, guard: CommitGuard | None) -> None:
        try:
            session.commit()
        except exc.DBAPIError as error:
            if guard is None or not _is_away(error) or not self._was_committed(session, guard):
                raise

    def _was_committed(self, session: Session, guard: CommitGuard) -> bool:
        """Whether a COMMIT that failed was carried out all the same. Asked in a transaction, which waits for one still open."""
        connection = session.get_bind()
        assert isinstance(connection, Connection)
        connection.invalidate()  # what it did not commit is gone, and holds nothing up

        def ask() -> bool:
            with self._session(read_only=False) as other:
                return guard.was_committed(other)

        return patiently(ask)

    @contextmanager
    def _session(self, *, read_only: bool) -> Iterator[Session]:
        options: dict[str, Any] = {_READ_ONLY: read_only}
        if read_only and self.engine.dialect.name == "postgresql":
            options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        try:
            # expire_on_commit would turn every attribute read after the block into a query on a closed session.
            with (
                self.engine.connect().execution_options(**options) as connection,
                _left_behind(connection),
                Session(connection, expire_on_commit=False, autoflush=False) as session,
            ):
                yield session
        except (exc.DBAPIError, exc.TimeoutError) as error:
            if not _is_away(error):
                raise
            raise DatabaseAway from error


def patiently(act: Callable[[], _T]) -> _T:
    """Act, and where the database is away act again, for a while. For what does no harm when it is done twice."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    tries = 0
    while True:
        try:
            return act()
        except DatabaseAway:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
        tries += 1


def at_commit(session: Session, write: Callable[[Session], None]) -> None:
    """Have ``write`` done last in the transaction: for what must hold a lock as briefly as can be."""
    session.info.setdefault(_AT_COMMIT, []).append(write)


def locked(session: Session, number: int, *, shared: bool = False) -> datetime:
    """Hold the lock of that number until the end of the transaction; the time when it was got, as of ``now``.

    SQLite has one writer at a time, who holds every lock.
    """
    if session.get_bind().dialect.name != "postgresql":
        return now(session)
    function = "pg_advisory_xact_lock_shared" if shared else "pg_advisory_xact_lock"
    _, present = session.execute(sa.text(f"SELECT {function}({number}), clock_timestamp()")).one()
    return present.astimezone(UTC)  # type: ignore[no-any-return]


def now(session: Session) -> datetime:
    """The database's present time, UTC: the only clock that leases and timestamps go by."""
    if session.get_bind().dialect.name == "postgresql":
        value: Any = session.scalar(sa.text("SELECT clock_timestamp()"))
        return value.astimezone(UTC)  # type: ignore[no-any-return]
    text = session.scalar(sa.text("SELECT strftime('%Y-%m-%dT%H:%M:%f', 'now')"))
    return datetime.fromisoformat(str(text)).replace(tzinfo=UTC)


def make_engine(url: str) -> Engine:
    """An engine with the settings that the rest relies on. SQLite is the bundled one: the system's may be too old."""
    if make_url(url).get_backend_name() != "sqlite":
        engine = sa.create_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=20)
        event.listen(engine, "connect", _configure_postgres)
        return engine
    # SQLite 3.7.0-3.51.2 can corrupt a database in WAL mode when several connections checkpoint at once.
    engine = sa.create_engine(url, module=pysqlite3.dbapi2, connect_args={"timeout": 60})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def _left_behind(connection: Connection) -> Iterator[None]:
    """Do not pool a connection that has failed: after a COMMIT that fails SQLAlchemy leaves its transaction open."""
    try:
        yield
    except exc.DBAPIError as error:
        if _is_away(error):
            connection.invalidate()
        raise


def _is_away(error: exc.DBAPIError | exc.TimeoutError) -> bool:
    """Whether the same may well succeed later: the database could not do it, and nothing is wrong with what was asked."""
    if isinstance(error, exc.TimeoutError):  # no connection of the pool came free
        return True
    if error.connection_invalidated:
        return True
    # SQLite has no class of errors for SQL that is wrong, such as one that names a table that is not there.
    mistaken = getattr(error.orig, "sqlite_errorcode", None) == pysqlite3.dbapi2.SQLITE_ERROR
    return isinstance(error, exc.OperationalError | exc.InterfaceError) and not mistaken


def _configure_postgres(connection: Any, record: Any) -> None:
    connection.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'")
    connection.commit()


def _configure_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
