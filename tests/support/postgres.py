"""A real PostgreSQL server for the tests: one for the session, a fresh database for each test that asks."""

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psycopg
import pytest

from tests.support.ports import free_port

START_SECONDS = 30.0
STOP_SECONDS = 10.0
LOG = "server.log"
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # linux/prctl.h; SIGQUIT is PostgreSQL's immediate shutdown


@dataclass(frozen=True)
class PostgresServer:
    """A running server that trusts its superuser `postgres`, on 127.0.0.1 and on a unix socket."""

    port: int
    socket_dir: Path
    pid: int

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of the maintenance database."""
        return self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@127.0.0.1:{self.port}/{database}"

    def connect(self) -> psycopg.Connection:
        """An autocommit connection to the maintenance database."""
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", autocommit=True
        )


def find_binaries() -> Path | None:
    """The folder that has both `initdb` and `postgres`: on PATH, else the newest that Debian installed."""
    on_path = shutil.which("initdb")
    installed = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"),
        key=lambda path: float(path.parent.parent.name),
        reverse=True,
    )
    for initdb in [Path(on_path), *installed] if on_path else installed:
        # Client packages put wrappers on PATH; the server lies beside the real one.
        folder = initdb.resolve().parent
        if (folder / "postgres").exists():
            return folder
    return None


def _server_account() -> str | None:
    """The account the server must run as: PostgreSQL refuses root, so there it is Debian's `postgres`."""
    return "postgres" if os.geteuid() == 0 else None


def _unavailable() -> str | None:
    """Why no server can be started here, or None."""
    if find_binaries() is None:
        return "no PostgreSQL server here: install the Debian package `postgresql`"
    account = _server_account()
    if account is not None and account not in {entry.pw_name for entry in pwd.getpwall()}:
        return f"running as root, and there is no account `{account}` to start PostgreSQL as"
    return None


def _ends_with_parent() -> Callable[[], object] | None:
    """What the child calls before exec, so that a test run that is killed takes its server along."""
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGQUIT)


def initialise(folder: Path) -> None:
    """Make an empty cluster under ``folder``, owned by the account that the server runs as."""
    binaries = find_binaries()
    assert binaries is not None
    account = _server_account()
    if account is not None:
        shutil.chown(folder, account, account)
    data = folder / "data"
    command = [str(binaries / "initdb"), "--pgdata", str(data), "--username", "postgres", "--auth", "trust"]
    command += ["--encoding", "UTF8", "--no-locale", "--no-sync", "--no-instructions"]
    done = subprocess.run(
        command,
        user=account,
        group=account,
        extra_groups=None if account is None else [],
        cwd=data.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"initdb failed:\n{done.stdout}")


def wait_until_ready(server: PostgresServer, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            server.connect().close()
            return
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"PostgreSQL did not start:\n{(server.socket_dir / LOG).read_text()}"
                ) from error
        time.sleep(POLL_SECONDS)


@contextmanager
def run_server(folder: Path, **changes: str) -> Iterator[PostgresServer]:
    """Start a server under `folder`, with `changes` to its settings, and at the end stop it by its own pid.

    `folder` must be short: a unix socket's path may have 107 bytes.
    """
    initialise(folder)
    port = free_port()
    process = start(folder, port, **changes)
    server = PostgresServer(port=port, socket_dir=folder, pid=process.pid)
    try:
        wait_until_ready(server, process)
        yield server
    finally:
        process.send_signal(signal.SIGINT)  # a fast shutdown: open connections are ended, not waited for
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)
            process.wait(STOP_SECONDS)


def start(folder: Path, port: int, **changes: str) -> subprocess.Popen[bytes]:
    """Start the server on the data under ``folder``, with ``changes`` to its settings."""
    binaries = find_binaries()
    assert binaries is not None
    account = _server_account()
    settings = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": str(folder),
        # Nothing here outlives the run, so nothing is written for a crash.
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        "shared_buffers": "32MB",
        "timezone": "UTC",
    } | changes
    command = [str(binaries / "postgres"), "-D", str(folder / "data"), "-p", str(port)]
    for name, value in settings.items():
        command += ["-c", f"{name}={value}"]

    with (folder / LOG).open("ab") as output:
        return subprocess.Popen(
            command,
            user=account,
            group=account,
            extra_groups=None if account is None else [],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_ends_with_parent(),
        )


def require_server() -> None:
    """Skip where no server can be started; in CI, where one must be, fail."""
    reason = _unavailable()
    if reason is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The session's server."""
    require_server()
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder, run_server(Path(folder)) as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database that exists for this test alone."""
    database = f"test_{uuid.uuid4().hex}"
    with postgres_server.connect() as connection:
        connection.execute(f'CREATE DATABASE "{database}"')
    yield postgres_server.url_of(database)
    with postgres_server.connect() as connection:
        # FORCE: a test that failed may have left connections behind.
        connection.execute(f'DROP DATABASE "{database}" WITH (FORCE)')
