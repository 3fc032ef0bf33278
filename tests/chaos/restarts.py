"""Restarts PostgreSQL repeatedly, by a shutdown or a crash, while orchestrators work."""

import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos import traffic
from tests.chaos.databases import Databases
from tests.chaos.processes import Fleet
from tests.chaos.report import Report
from tests.chaos.traffic import Traffic
from tests.chaos.world import worlds
from tests.support.ports import free_port
from tests.support.postgres import PostgresServer, initialise, start, wait_until_ready

ORCHESTRATORS = 4
LINES = 8
LEASE_SECONDS = 2.0
BETWEEN_SECONDS = (5.0, 40.0)
AWAY_SECONDS = (0.0, 4.0)
SECONDS_PER_VERSION = 30.0
STOP_SECONDS = 30.0


class RestartedServer:
    """A server to restart. It keeps its commits if the process crashes, but not the machine, because it does not fsync."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.restarts = 0
        initialise(folder)
        self.start()

    @property
    def server(self) -> PostgresServer:
        return PostgresServer(self._port, self._folder, self._process.pid)

    def restart(self, how: signal.Signals, away_seconds: float) -> None:
        """Restart the server. SIGINT aborts open transactions; SIGQUIT is a crash, with recovery at the next start."""
        self.stop(how)
        time.sleep(away_seconds)
        self.start()
        self.restarts += 1

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        self._process.send_signal(how)
        self._process.wait(STOP_SECONDS)

    def start(self) -> None:
        self._process: subprocess.Popen[bytes] = start(self._folder, self._port, synchronous_commit="on")
        wait_until_ready(self.server, self._process)


def run(
    folder: Path,
    server_folder: Path,
    *,
    seconds: float = 90.0,
    between_seconds: tuple[float, float] = BETWEEN_SECONDS,
    min_transitions: int = 0,
    seed: int = 0,
) -> Report:
    """Restart the server for ``seconds``. The path ``server_folder`` must be short, as for ``run_server``."""
    restarted = RestartedServer(server_folder)
    try:
        databases = Databases("postgresql", folder, restarted.server)
        return _run(databases, restarted, folder, seconds, between_seconds, min_transitions, seed)
    finally:
        restarted.stop()


def _run(
    databases: Databases,
    restarted: RestartedServer,
    folder: Path,
    seconds: float,
    between_seconds: tuple[float, float],
    min_transitions: int,
    seed: int,
) -> Report:
    work = Traffic(
        lines=LINES,
        versions=max(2, round(seconds / SECONDS_PER_VERSION)),
        orchestrators=ORCHESTRATORS,
        lease_seconds=LEASE_SECONDS,
        seconds_between=seconds / max(2, round(seconds / SECONDS_PER_VERSION)),
    )
    began = time.monotonic()
    next_restart = began + between_seconds[0]
    crashes = 0

    def disturb(fleet: Fleet, rng: random.Random, holding: Sequence[str]) -> None:
        nonlocal next_restart, crashes
        if time.monotonic() < next_restart:
            return
        how = rng.choice((signal.SIGINT, signal.SIGQUIT))
        crashes += how == signal.SIGQUIT
        restarted.restart(how, rng.uniform(*AWAY_SECONDS))
        next_restart = time.monotonic() + rng.uniform(*between_seconds)

    def enough(fleet: Fleet) -> bool:
        return time.monotonic() - began >= seconds

    root = folder / f"artifacts-{time.monotonic_ns()}"
    with worlds() as manager, databases.fresh() as url:
        world = manager.world(str(root), traffic.STAGE_SECONDS)
        result = traffic.run(url, root, world, work, disturb, enough, seed)
    report = traffic.report_of(
        f"PostgreSQL restarted under {ORCHESTRATORS} orchestrators", result, time.monotonic() - began
    )
    report.figures = {"restarts": restarted.restarts, "of those, crashes": crashes} | report.figures
    report.require(restarted.restarts > 0, "nothing was restarted")
    report.require(
        result.transitions >= min_transitions,
        f"{result.transitions} transitions, fewer than {min_transitions}",
    )
    return report
