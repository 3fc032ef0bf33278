"""Orchestrators wait for a database that is unavailable, and a commit with a lost reply does no harm."""

import logging
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from service.core.errors import DatabaseUnavailable
from service.main import tick_until
from service.orchestrator.loop import Orchestrator
from service.store import database as store_database
from service.store import stages
from service.store.database import Database
from service.store.migrate import upgrade
from service.store.tables import Dataset
from tests.chaos.databases import Databases, add_line, push, unfinished
from tests.chaos.restarts import RestartedServer
from tests.chaos.world import OutsideExecutor, OutsideServing, World
from tests.support.postgres import require_server
from tests.support.rows import add_dataset, ready_stage


@pytest.fixture
def restarted() -> Iterator[RestartedServer]:
    require_server()
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:
        server = RestartedServer(Path(folder))
        yield server
        server.stop()


@pytest.mark.postgres
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
def test_an_orchestrator_waits_for_postgresql_and_continues(
    restarted: RestartedServer, how: signal.Signals, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="service.orchestrator.loop")
    with Databases("postgresql", tmp_path, restarted.server).fresh() as url:
        database, world = Database(url), World(str(tmp_path / "artifacts"))
        orchestrator = Orchestrator(
            database, world.artifacts, OutsideExecutor(world), OutsideServing(world), "o", 30.0
        )
        add_line(database, "line")
        push(database, "line", 1)
        orchestrator.tick()
        restarted.stop(how)
        assert not orchestrator.tick()
        assert not orchestrator.tick()
        assert [r.levelname for r in caplog.records if "waiting for the database" in r.message] == ["ERROR"]
        restarted.start()
        stopping = threading.Event()
        ticking = threading.Thread(target=tick_until, args=(stopping, orchestrator, 0.01))
        ticking.start()
        while unfinished(database):
            assert ticking.is_alive()
            stopping.wait(0.05)
        stopping.set()
        ticking.join()
        assert "the database answers again" in caplog.text
        database.close()


@pytest.mark.parametrize("committed", [False, True])
def test_a_failed_commit_leaves_no_transaction_open(
    database: Database, committed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Database(database.url)
    dialect: Any = own.engine.dialect
    commit, failure = dialect.do_commit, dialect.loaded_dbapi.OperationalError

    def do_commit(connection: Any) -> None:
        if committed:
            commit(connection)
        raise failure("the reply was lost")

    monkeypatch.setattr(dialect, "do_commit", do_commit)
    with pytest.raises(DatabaseUnavailable), own.transaction() as session:
        add_dataset(session, "d")
    monkeypatch.undo()
    with own.reading() as session:
        assert bool(session.scalar(sa.select(Dataset.id))) == committed
    add_line(database, "others-may-write")
    own.close()


def test_an_sql_error_does_not_count_as_an_unavailable_database(database: Database) -> None:
    with pytest.raises(DBAPIError), database.reading() as session:
        session.execute(sa.text("SELECT * FROM nowhere"))


@pytest.mark.postgres
def test_a_process_stopped_in_a_transaction_loses_its_locks_after_a_while(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade(postgres_url)
    monkeypatch.setattr(store_database, "IDLE_SECONDS", 1)
    stopped, other = Database(postgres_url), Database(postgres_url)
    stage = ready_stage(other)

    def claim(database: Database, owner: str) -> bool:
        with database.transaction() as session:
            claimed = stages.claim(session, [stage.id], owner=owner, lease_seconds=30, run_id="run-1")
            if owner == "stopped":
                assert claimed
                assert not claim(other, "other")
                time.sleep(1.5)
                assert claim(other, "other")
        return claimed is not None

    with pytest.raises(DatabaseUnavailable):
        claim(stopped, "stopped")
    with other.reading() as session:
        assert stages.get(session, stage.id).owner == "other"
    stopped.close()
    other.close()
