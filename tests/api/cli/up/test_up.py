"""`pathswitch up` for real: it starts, stops, and restarts on the home of one that was killed."""

import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from api.cli.up import processes
from api.client import Client
from tests.support.up import Up, assert_nothing_is_left, up_that_ends


@pytest.mark.ray
def test_up_continues_after_kill_9_and_leaves_no_process(home: Path) -> None:
    first = Up(home)
    lines = first.wait_until_ready()
    parts = {line.removeprefix("pathswitch: ")[:15].strip() for line in lines}
    assert parts == {"database", "artifacts", "ray", "orchestrator", "control plane", "serve", "ready"}
    assert len(first.started) > 10, "Ray alone has more processes"
    assert (home / "ray-token").stat().st_mode & 0o777 == 0o600
    with Client(first.urls["api"]) as client:
        assert client.ready().parts == ("database", "artifacts", "ray")
        client.create_dataset("kept")
    assert httpx.get(f"{first.urls['serve']}/models").json()["data"] == []
    other = up_that_ends("--home", str(home))
    assert other.returncode == 1
    assert f"another `pathswitch up` (process {first.process.pid}) is running on the home" in other.stderr

    first.kill()
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


def test_a_port_in_use_is_reported_before_anything_starts(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = up_that_ends("--home", str(home), "--api-port", str(port))
    assert done.returncode == 1
    assert f"port {port} on 127.0.0.1, meant for the control plane, is in use" in done.stderr
    assert "--api-port or PATHSWITCH_API_PORT" in done.stderr


@pytest.mark.parametrize("name", ["PATHSWITCH_API_PORT", "PATHSWITCH_EXECUTOR"])
def test_an_invalid_setting_is_named(home: Path, name: str) -> None:
    done = up_that_ends("--home", str(home), **{name: "nonsense"})
    assert done.returncode == 1
    assert f"{name}: " in done.stderr
    assert "Traceback" not in done.stderr
