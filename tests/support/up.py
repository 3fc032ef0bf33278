"""Runs `pathswitch up` as a child process of the tests, on its own home and free ports."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from api.cli.up import ports, processes
from api.cli.up.processes import Process
from service.settings import Settings

START_SECONDS = 200.0
STOP_SECONDS = 60.0


class Up:
    """A `pathswitch up`, by default on free ports.

    ``started`` are its descendants at the time it became ready.
    """

    def __init__(self, home: Path, ports: tuple[int, int] = (0, 0), **environment: str) -> None:
        self.home = home
        command = [sys.executable, "-m", "api.cli.main", "up", "--home", str(home)]
        api_port, serve_port = ports
        self.process = subprocess.Popen(
            [*command, "--api-port", str(api_port), "--serve-port", str(serve_port)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout
        self.started: set[Process] = set()

    def wait_until_ready(self) -> list[str]:
        deadline = time.monotonic() + START_SECONDS
        lines: list[str] = []
        while not lines or lines[-1] != "pathswitch: ready":
            assert time.monotonic() < deadline
            line = self.output.readline()
            assert line, "\n".join(lines)
            lines.append(line.rstrip())
        self.started = self.descendants()
        return lines

    @property
    def urls(self) -> dict[str, str]:
        urls: dict[str, str] = json.loads((self.home / "processes.json").read_text())["urls"]
        return urls

    def descendants(self) -> set[Process]:
        """Its current descendants, including orphans, which it adopts."""
        return processes.descendants([self.process.pid], processes.all_processes())

    def ended_with(self, number: signal.Signals) -> list[str]:
        """Send the signal, wait for a successful end, and return the lines printed meanwhile."""
        self.process.send_signal(number)
        with self.output:
            lines = self.output.read().splitlines()
        assert self.process.wait(STOP_SECONDS) == 0
        return lines

    def kill(self) -> None:
        """Send SIGKILL, which leaves no chance to clean up."""
        self.process.kill()
        self.process.wait()
        self.output.close()


@contextmanager
def running_up(settings: Settings) -> Iterator[Up]:
    """Run `up` for the length of the block. It is ready at the start and leaves no process at the end."""
    home = settings.home
    up = Up(home, PATHSWITCH_DATABASE_URL=settings.database, PATHSWITCH_ARTIFACTS_URL=settings.artifacts)
    try:
        up.wait_until_ready()
        yield up
        up.ended_with(signal.SIGTERM)
    finally:
        up.kill()  # first, because it would restart parts that are killed
        kill_leftovers(home)


def kill_leftovers(home: Path) -> None:
    for process in started_on(home):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def started_on(home: Path) -> set[Process]:
    """Processes with the home in their environment, found without the code under test."""
    mark = f"PATHSWITCH_HOME={home}\0".encode()
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                status = processes.status(int(entry.name))
                if status is not None and not status.zombie:
                    found.add(status.process)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


def assert_nothing_is_left(up: Up, urls: dict[str, str]) -> None:
    """Assert that all processes have ended and all ports are free."""
    assert not {process for process in up.started if processes.alive(process)}
    assert not started_on(up.home)
    for url in urls.values():
        port = urlsplit(url).port
        assert port is not None
        assert ports.is_free("127.0.0.1", port)


def up_that_ends(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "api.cli.main", "up", *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )
