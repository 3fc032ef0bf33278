"""One local Ray cluster for the whole test session, started like a production head and ended by its pid.

``ray.init()`` would use fixed ports, which orphans of a killed Ray hold for a minute, and ``ray stop`` would
end every Ray on the machine. This cluster uses free ports and its own folder, so several sessions can run at
once.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.ports import free_ports

ROOT = Path(__file__).parents[2]
NUM_CPUS = 8  # logical, so that trainers, replicas and control actors fit on a machine with two
OBJECT_STORE_BYTES = 200_000_000
START_SECONDS = 90.0
STOP_SECONDS = 30.0

# The kernel ends the head when this process dies, even by kill -9. A launcher asks for that and then becomes
# the head, because code between fork and exec is unsafe in a process with threads.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
"""

# The same as for the head of `pathswitch up`; api/cli/up/local_ray.py explains them.
_HEAD_ENVIRONMENT = {
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}


@dataclass(frozen=True)
class RayCluster:
    address: str  # for ray.init, e.g. "127.0.0.1:41234"
    dashboard_url: str  # for the Jobs client
    token: str
    pid: int


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A running cluster, to which this process is connected as a driver."""
    with started_ray() as cluster, connected(cluster):
        yield cluster


@contextmanager
def started_ray() -> Iterator[RayCluster]:
    """Start a head node with token authentication, and end it afterwards."""
    token = secrets.token_hex(32)
    gcs_port, dashboard_port, client_port = free_ports(3)
    # Unix socket paths are limited to about 100 characters: a short folder, not one of pytest's.
    folder = Path(tempfile.mkdtemp(prefix="psw-", dir="/tmp"))
    command = [
        sys.executable,
        "-c",
        _LAUNCHER,
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={gcs_port}",
        f"--dashboard-port={dashboard_port}",
        f"--ray-client-server-port={client_port}",
        "--dashboard-host=127.0.0.1",
        "--dashboard-agent-listen-port=0",
        "--min-worker-port=0",
        "--max-worker-port=0",
        f"--temp-dir={folder}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--num-cpus={NUM_CPUS}",
        '--resources={"trainer": 1}',
        "--disable-usage-stats",
    ]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            command,
            env=os.environ | _environment(token) | _HEAD_ENVIRONMENT,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_for_port(head, gcs_port, folder / "head.log")
        yield RayCluster(f"127.0.0.1:{gcs_port}", f"http://127.0.0.1:{dashboard_port}", token, head.pid)
    finally:
        head.terminate()
        try:
            head.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            head.kill()
            head.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def connected(cluster: RayCluster) -> Iterator[None]:
    """Connect to the cluster as a driver. Restores environment and signal handlers afterwards."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as undo:
        for name, value in _environment(cluster.token).items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        import ray

        undo.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        undo.callback(ray.shutdown)
        yield


def _environment(token: str) -> dict[str, str]:
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def _wait_for_port(head: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if head.poll() is not None:
            break
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"Ray did not start:\n{log.read_text(errors='replace')[-4000:]}")
