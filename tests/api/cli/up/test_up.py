"""`pathswitch up` for real: started, stopped, killed, started again on what it had left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from api.cli.up import ports, processes
from api.cli.up.processes import Process
from api.client import Client

START_SECONDS = 200.0
STOP_SECONDS = 60.0


class Up:
    """One `pathswitch up` on free ports. ``started`` is what descends from it, once it is ready."""

    def __init__(self, home: Path, **environment: str) -> None:
        self.home = home
        command = [sys.executable, "-m", "api.cli.main", "up", "--home", str(home)]
        self.process = subprocess.Popen(
            [*command, "--api-port", "0", "--serve-port", "0"],
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
        self.started = processes.descendants([self.process.pid], processes.all_processes())
        return lines

    @property
    def urls(self) -> dict[str, str]:
        urls: dict[str, str] = json.loads((self.home / "processes.json").read_text())["urls"]
        return urls

    def ended_with(self, number: signal.Signals) -> list[str]:
        """Send the signal, and return what it prints until it has ended well."""
        self.process.send_signal(number)
        with self.output:
            lines = self.output.read().splitlines()
        assert self.process.wait(STOP_SECONDS) == 0
        return lines


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home of whose processes none outlives the test, also where that fails."""
    yield tmp_path / "home"
    for process in started_on(tmp_path / "home"):
        os.kill(process.pid, signal.SIGKILL)


def started_on(home: Path) -> set[Process]:
    """What has the home in its environment: found without asking the code under test."""
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


@pytest.mark.ray
def test_up_starts_carries_on_after_kill_9_and_leaves_nothing(home: Path) -> None:
    first = Up(home)
    lines = first.wait_until_ready()
    parts = {line.removeprefix("pathswitch: ")[:15].strip() for line in lines}
    assert parts == {"database", "artifacts", "ray", "orchestrator", "control plane", "serve", "ready"}
    assert len(first.started) > 10, "Ray alone is more"
    assert (home / "ray-token").stat().st_mode & 0o777 == 0o600
    with Client(first.urls["api"]) as client:
        assert client.ready().parts == ("database", "artifacts", "ray")
        client.create_dataset("kept")
    assert httpx.get(f"{first.urls['serve']}/models").json()["data"] == []
    other = up_that_ends("--home", str(home))
    assert other.returncode == 1
    assert f"another `pathswitch up` (process {first.process.pid}) runs on the home" in other.stderr

    first.process.kill()
    first.process.wait()
    first.output.close()
    time.sleep(2)
    again = Up(home)
    again.wait_until_ready()
    assert not {process for process in first.started if processes.alive(process)}
    with Client(again.urls["api"]) as client:
        assert [dataset.name for dataset in client.datasets()] == ["kept"]

    urls = again.urls
    lines = again.ended_with(signal.SIGTERM)
    assert [line for line in lines if "stop" in line] == [
        "pathswitch: control plane  stopping",
        "pathswitch: orchestrator   stopping",
        "pathswitch: ray            stopping",
        "pathswitch: stopped",
    ]
    assert_nothing_is_left(again, urls)


def test_up_without_ray_ends_on_ctrl_c(home: Path) -> None:
    up = Up(home, PATHSWITCH_EXECUTOR="local")
    up.wait_until_ready()
    urls = up.urls
    assert up.ended_with(signal.SIGINT)[-1] == "pathswitch: stopped"
    assert_nothing_is_left(up, urls)
    assert not (home / "ray-token").exists()


def test_a_port_in_use_is_told_before_anything_starts(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = up_that_ends("--home", str(home), "--api-port", str(port))
    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1, where the control plane should listen, is in use" in done.stderr
    assert "--api-port or PATHSWITCH_API_PORT" in done.stderr


@pytest.mark.parametrize("name", ["PATHSWITCH_API_PORT", "PATHSWITCH_EXECUTOR"])
def test_a_setting_that_cannot_be_is_named(home: Path, name: str) -> None:
    done = up_that_ends("--home", str(home), **{name: "nonsense"})
    assert done.returncode == 1
    assert f"{name}: " in done.stderr
    assert "Traceback" not in done.stderr
