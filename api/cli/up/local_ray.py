"""The local Ray of `up`: one head in the foreground of a child process, with a token and a folder of its own.

Every flag has a reason that was measured: beside other clusters no port may be Ray's default, the dashboard
agent must not wait for a port that orphans hold, and logical CPUs must fit a trainer, replicas and actors.
"""

import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

import httpx

from api.cli.errors import CliError
from api.cli.up import ports

HOST = "127.0.0.1"
OBJECT_STORE_BYTES = 300_000_000
# Ray's sockets lie some 65 characters below its temporary folder, and a socket's path holds 107.
LONGEST_FOLDER = 40


class LocalRay:
    """Ports are chosen once and kept while they can be: a Ray that is started again has the same address."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._folder = _temporary_folder(home)
        self._token = _token(home / "ray-token")
        self._ports: list[int] = []

    @property
    def address(self) -> str:
        return f"{HOST}:{self._ports[0]}"

    @property
    def dashboard(self) -> str:
        return f"http://{HOST}:{self._ports[1]}"

    def prepare(self) -> None:
        """Before each start: put the last one's logs into the home, replace ports that were taken."""
        self.clear()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if self._folder.is_symlink() or self._folder.stat().st_uid != os.getuid():
            raise CliError(
                f"{self._folder}, where the local Ray should keep its files, belongs to someone else"
            )
        if not self._ports or not all(ports.is_free(HOST, port) for port in self._ports):
            self._ports = ports.free_ports(HOST, 3)

    def clear(self) -> None:
        """Remove what an ended Ray left, but for the logs of its last session."""
        logs = self._folder / "session_latest" / "logs"
        if logs.is_dir():
            kept = self._home / "logs" / "ray"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(logs.resolve(), kept, ignore_dangling_symlinks=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    def command(self) -> list[str]:
        port, dashboard_port, client_port = self._ports
        return [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
            f"--node-ip-address={HOST}",
            f"--port={port}",
            f"--dashboard-port={dashboard_port}",
            f"--ray-client-server-port={client_port}",
            "--include-dashboard=true",  # training runs are Ray Jobs, and their API is the dashboard's
            "--dashboard-agent-listen-port=0",
            "--min-worker-port=0",
            "--max-worker-port=0",
            f"--temp-dir={self._folder}",
            f"--num-cpus={max(8, 2 * (os.cpu_count() or 1))}",
            f"--resources={json.dumps({'trainer': 1})}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--disable-usage-stats",
            "--log-style=record",
        ]

    def environment(self) -> dict[str, str]:
        """What the head is started with, beside what a client of it needs."""
        return {
            **self.client_environment(),
            # A head would wait for Serve's replicas to leave a node that has nowhere to leave to: 15 s at each stop.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            # By default 60 s, which a busy machine with two cores has been seen to take.
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
            # A dead HTTP proxy is replaced after three looks: by default half a minute without an answer.
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
            # Half the Python for an item of a stream, in every process on its way, than with an object of Ray's for each.
            "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        }

    def client_environment(self) -> dict[str, str]:
        """What a process needs to speak to it."""
        return {
            "PATHSWITCH_RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
        }

    def ready(self) -> bool:
        """Whether the node has joined and the dashboard, which has the Jobs API, answers."""
        try:
            answer = httpx.get(
                f"{self.dashboard}/nodes",
                params={"view": "summary"},
                headers={"Authorization": f"Bearer {self._token}"},
                timeout=2,
                trust_env=False,
            )
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and bool(answer.json()["data"]["summary"])


def _temporary_folder(home: Path) -> Path:
    base = Path(tempfile.gettempdir())
    name = "pathswitch-" + hashlib.sha256(f"{os.getuid()}:{home}".encode()).hexdigest()[:12]
    return base / name if len(str(base / name)) <= LONGEST_FOLDER else Path("/tmp", name)


def _token(path: Path) -> str:
    """The home's token, made once, for its owner's eyes only."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path.read_text().strip()
