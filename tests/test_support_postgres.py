"""The PostgreSQL that the tests start is real, and each test has a database of its own."""

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


def test_a_fresh_database_answers_and_is_empty(postgres_url: str) -> None:
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


def test_what_one_test_wrote_the_next_does_not_see(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    engine = create_engine(postgres_url, poolclass=NullPool)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT to_regclass('left_behind')")).scalar_one() is None
    assert len([name for name in _databases(postgres_server) if name.startswith("test_")]) == 1


def test_a_second_server_runs_beside_the_first_and_ends_alone(postgres_server: PostgresServer) -> None:
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:
        with postgres.run_server(Path(folder)) as second:
            assert second.port != postgres_server.port
            assert _databases(second) == {"postgres", "template0", "template1"}
        with pytest.raises(ProcessLookupError):
            os.kill(second.pid, 0)
    assert "postgres" in _databases(postgres_server)


def test_without_a_server_tests_skip_and_in_ci_they_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "find_binaries", lambda: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no PostgreSQL server"):
        postgres.require_server()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no PostgreSQL server"):
        postgres.require_server()
