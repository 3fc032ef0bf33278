"""Moves the clock of one host an hour forward and back while orchestrators work.

Leases use the database's clock, so there are two clocks to move. ``time.time`` is replaced for a process. For the
database, SQLite gets another ``strftime``, and PostgreSQL another ``clock_timestamp`` earlier on the search path. The
kernel's clock does not change.
"""

import random
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from service.store import columns
from service.store.database import Database
from tests.chaos import traffic
from tests.chaos.databases import Databases, opened
from tests.chaos.processes import Fleet
from tests.chaos.report import Report
from tests.chaos.traffic import Traffic
from tests.chaos.world import worlds

HOUR_SECONDS = 3600.0
ORCHESTRATORS = 3
LINES = 3
LEASE_SECONDS = 1.0
BETWEEN_SECONDS = (1.5, 3.0)


class MovedClock:
    """The offset of the moved clock in seconds, in a file, so that all processes see a change at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.move_to(0.0)

    def move_to(self, seconds: float) -> None:
        written = self._path.with_suffix(".new")
        written.write_text(str(seconds))
        written.replace(self._path)

    def seconds(self) -> float:
        return float(self._path.read_text())


def move_process_clock(clock: MovedClock) -> None:
    """Move ``time.time`` and ``time.time_ns`` for the rest of this process's life. New ids depend on them."""
    real_time, real_time_ns = time.time, time.time_ns
    time.time = lambda: real_time() + clock.seconds()
    time.time_ns = lambda: real_time_ns() + int(clock.seconds() * 1e9)
    assert columns.time is time  # type: ignore[attr-defined]  # new_id reads the replaced functions


def move_database_clock(database: Database, clock: MovedClock) -> None:
    """Move the clock of a database. Call before its first connection."""

    def on_connect(connection: Any, record: Any) -> None:
        if database.engine.dialect.name == "postgresql":
            connection.execute("SELECT set_config('search_path', 'chaos, pg_catalog, public', false)")
            connection.commit()
        else:
            connection.create_function("strftime", 2, lambda pattern, when: _strftime(clock, pattern, when))

    event.listen(database.engine, "connect", on_connect)


def install_postgres_clock(database: Database) -> None:
    """Create a ``clock_timestamp`` that adds the offset in the single row of ``chaos.clock``."""
    with database.engine.connect() as connection:
        connection.execute(sa.text("CREATE SCHEMA chaos"))
        connection.execute(sa.text("CREATE TABLE chaos.clock (seconds double precision)"))
        connection.execute(sa.text("INSERT INTO chaos.clock VALUES (0)"))
        connection.execute(
            sa.text(
                "CREATE FUNCTION chaos.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE AS $$ "
                "SELECT pg_catalog.clock_timestamp() + seconds * interval '1 second' FROM chaos.clock $$"
            )
        )
        connection.commit()


def move_postgres_clock(database: Database, seconds: float) -> None:
    with database.engine.connect() as connection:
        connection.execute(sa.text("UPDATE chaos.clock SET seconds = :seconds"), {"seconds": seconds})
        connection.commit()


def _strftime(clock: MovedClock, pattern: str, when: str) -> str:
    assert (pattern, when) == ("%Y-%m-%dT%H:%M:%f", "now")
    return (datetime.now(UTC) + timedelta(seconds=clock.seconds())).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]


def run(databases: Databases, folder: Path, *, host: str, moves: int = 6, seed: int = 0) -> Report:
    """Move the clock of one host repeatedly. ``host``: ``one`` of several orchestrators, or the ``database``.

    On SQLite, the orchestrator's view of the database's clock moves too. This is harsher than reality, where all
    processes that share a file share a host.
    """
    clock = MovedClock(folder / f"clock-{time.monotonic_ns()}")
    postgres = databases.kind == "postgresql"
    work = Traffic(
        lines=LINES,
        versions=max(2, moves // 2),
        orchestrators=ORCHESTRATORS,
        lease_seconds=LEASE_SECONDS,
        seconds_between=2 * sum(BETWEEN_SECONDS) / 2,
    )
    moved = 0
    next_move = time.monotonic() + 1.0

    def prepare(owner: str, database: Database) -> None:
        """Runs in the process of an orchestrator before it starts."""
        if host == "database":
            move_database_clock(database, clock)
        elif owner == "o1":
            move_process_clock(clock)
            if not postgres:
                move_database_clock(database, clock)

    root = folder / f"artifacts-{time.monotonic_ns()}"
    began = time.monotonic()
    with worlds() as manager, databases.fresh() as url:
        if postgres and host == "database":
            with opened(url) as database:
                install_postgres_clock(database)

        def disturb(fleet: Fleet, rng: random.Random, holding: Sequence[str]) -> None:
            nonlocal moved, next_move
            if time.monotonic() < next_move:
                return
            seconds = (HOUR_SECONDS, -HOUR_SECONDS, 0.0)[moved % 3]
            clock.move_to(seconds)
            if postgres and host == "database":
                with opened(url) as database:
                    move_postgres_clock(database, seconds)
            moved += 1
            next_move = time.monotonic() + rng.uniform(*BETWEEN_SECONDS)

        def enough(fleet: Fleet) -> bool:
            return moved >= moves

        world = manager.world(str(root), traffic.STAGE_SECONDS)
        result = traffic.run(url, root, world, work, disturb, enough, seed, prepare=prepare)
    where = "the database" if host == "database" else "the host of one orchestrator"
    report = traffic.report_of(
        f"clock moved by an hour: {where}, {databases.kind}", result, time.monotonic() - began
    )
    report.figures = {"moves": moved} | report.figures
    return report
