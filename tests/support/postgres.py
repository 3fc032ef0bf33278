"""A real PostgreSQL server: one per test session, with a new database for each test that needs one."""

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
    """A running server with the superuser `postgres` and no passwords, on 127.0.0.1 and a unix socket."""

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
    """The folder with `initdb` and `postgres`: from PATH, or else the newest that Debian installed."""
    on_path = shutil.which("initdb")
    installed = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"),
        key=lambda path: float(path.parent.parent.name),
        reverse=True,
    )
    for initdb in [Path(on_path), *installed] if on_path else installed:
        # Client packages put wrappers on PATH; `postgres` is in the folder of the real `initdb`.
        folder = initdb.resolve().parent
        if (folder / "postgres").exists():
            return folder
    return None


def _server_account() -> str | None:
    """The account to run the server as. PostgreSQL refuses to run as root, so root uses Debian's `postgres`."""
    return "postgres" if os.geteuid() == 0 else None


def _unavailable() -> str | None:
    """Why this machine cannot start a server, or None if it can."""
    if find_binaries() is None:
        return "no PostgreSQL server found: install the Debian package `postgresql`"
    account = _server_account()
    if account is not None and account not in {entry.pw_name for entry in pwd.getpwall()}:
        return f"running as root, but the account `{account}`, which would run PostgreSQL, does not exist"
    return None


def _end_with_parent() -> Callable[[], object] | None:
    """The child's preexec function: the server ends when the test process is killed."""
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGQUIT)


def initialise(folder: Path) -> None:
    """Create an empty cluster under ``folder``, owned by the account that runs the server."""
    binaries = find_binaries()
    assert binaries is not None
    account = _server_account()
    if account is not None:
        shutil.chown(folder, account, account)
    data = folder / "data"
    command = [str(binaries / "initdb"), "--pgdata", str(data), "--username", "postgres", "--auth", "trust"]
    command += ["--encoding", "UTF8", "--no-locale", "--no-sync", "--no-instructions"]
    result = subprocess.run(
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
    if result.returncode:
        raise RuntimeError(f"initdb failed:\n{result.stdout}")


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
    """Run a server under `folder`, with `changes` to its settings.

    The path of `folder` must be short: the path of a unix socket is limited to 107 bytes.
    """
    initialise(folder)
    port = free_port()
    process = start(folder, port, **changes)
    server = PostgresServer(port=port, socket_dir=folder, pid=process.pid)
    try:
        wait_until_ready(server, process)
        yield server
    finally:
        # Fast shutdown: closes open connections instead of waiting for them.
        process.send_signal(signal.SIGINT)
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
        # The data does not outlive the test run, so it need not survive a crash.
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
            preexec_fn=_end_with_parent(),
        )


def require_server() -> None:
    """Skip the test if this machine cannot start a server; in CI, fail it."""
    reason = _unavailable()
    if reason is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The server of the test session."""
    require_server()
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder, run_server(Path(folder)) as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database that only this test uses."""
    database = f"test_{uuid.uuid4().hex}"
    with postgres_server.connect() as connection:
        connection.execute(f'CREATE DATABASE "{database}"')
    yield postgres_server.url_of(database)
    with postgres_server.connect() as connection:
        # FORCE: a failed test may have left connections open.
        connection.execute(f'DROP DATABASE "{database}" WITH (FORCE)')
