"""The tests start a real PostgreSQL server and give each test its own database."""

import os
import tempfile
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests.support import postgres
from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.postgres


def _databases(server: PostgresServer) -> set[str]:
    with server.connect() as connection:
        return {name for (name,) in connection.execute("SELECT datname FROM pg_database").fetchall()}


def test_a_fresh_database_is_reachable_and_empty(postgres_url: str) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    with engine.begin() as connection:
        assert connection.execute(text("SELECT 6 * 7")).scalar_one() == 42
        assert (
            connection.execute(
                text("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
            ).scalar_one()
            == 0
        )
        connection.execute(text("CREATE TABLE left_behind (id integer)"))


def test_no_test_sees_the_tables_of_the_previous_one(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT to_regclass('left_behind')")).scalar_one() is None
    assert len([name for name in _databases(postgres_server) if name.startswith("test_")]) == 1


def test_a_second_server_starts_and_stops_independently(postgres_server: PostgresServer) -> None:
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:
        with postgres.run_server(Path(folder)) as second:
            assert second.port != postgres_server.port
            assert _databases(second) == {"postgres", "template0", "template1"}
        with pytest.raises(ProcessLookupError):
            os.kill(second.pid, 0)
    assert "postgres" in _databases(postgres_server)


def test_without_postgresql_tests_skip_locally_and_fail_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "find_binaries", lambda: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no PostgreSQL server"):
        postgres.require_server()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no PostgreSQL server"):
        postgres.require_server()
