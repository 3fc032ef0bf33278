"""The local Ray of `up`: a head node in a child process, with its own token, ports and temporary folder.

We learned these flags the hard way: other clusters on the machine use Ray's default ports, the dashboard agent
must not wait for a port that orphans hold, and the logical CPUs must be enough for a trainer, replicas and
actors.
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
# Ray appends about 65 characters to its temporary folder for sockets, whose paths may have 107 characters.
MAX_FOLDER_LENGTH = 40


class LocalRay:
    """A Ray head node.

    It keeps its ports across restarts if they are still free, so its address stays the same.
    """

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
        """Call before each start: clean up the last run, and replace ports that are taken."""
        self.clear()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if self._folder.is_symlink() or self._folder.stat().st_uid != os.getuid():
            raise CliError(f"the temporary folder of the local Ray, {self._folder}, belongs to another user")
        if not self._ports or not all(ports.is_free(HOST, port) for port in self._ports):
            self._ports = ports.free_ports(HOST, 3)

    def clear(self) -> None:
        """Copy the logs of the last session to the home, then delete the files of the Ray that has ended."""
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
            "--include-dashboard=true",  # training runs are Ray Jobs, whose API the dashboard serves
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
        """Environment of the head node: a client's environment, with settings for the head."""
        return {
            **self.client_environment(),
            # By default the head waits 15 s for replicas to move to another node, and there is no other node.
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            # The default of 60 s is too short on a busy machine with two cores.
            "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
            # Serve replaces a dead HTTP proxy after three failed health checks, by default half a minute.
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
            # gRPC takes half as much Python time per streamed item as one Ray object for each.
            "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
        }

    def client_environment(self) -> dict[str, str]:
        """Environment that a client of this Ray needs."""
        return {
            "PATHSWITCH_RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
        }

    def ready(self) -> bool:
        """Whether the node has joined and the dashboard with the Jobs API answers."""
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
    return base / name if len(str(base / name)) <= MAX_FOLDER_LENGTH else Path("/tmp", name)


def _token(path: Path) -> str:
    """The token of the home, created once and readable only by its owner."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    return path.read_text().strip()
