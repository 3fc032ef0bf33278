"""Runs the control plane as a separate process, to watch its memory and send it signals."""

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from service.settings import Settings
from tests.support.ports import free_port

START_SECONDS = 60.0
STOP_SECONDS = 30.0
WATCH_SECONDS = 0.02


@contextmanager
def server_process(settings: Settings) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run ``python -m api.main`` and yield its URL and process. At the end it must stop on SIGTERM."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = settings.model_copy(update={"api_port": port}).environment()
    process = subprocess.Popen([sys.executable, "-m", "api.main"], env=environment)
    try:
        _wait(url, process)
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            httpx.get(f"{url}/healthz").raise_for_status()
            return
        except httpx.TransportError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def resident_bytes(pid: int) -> int:
    """Current resident memory of a process (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def cpu_seconds(pid: int) -> float:
    """User and system CPU time that a process has used so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class MemoryWatch:
    """Watches the memory of a process for the length of a block.

    ``growth`` is its peak above the initial value.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = resident_bytes(pid)
        self._highest = self._before
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @property
    def growth(self) -> int:
        return self._highest - self._before

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            self._highest = max(self._highest, resident_bytes(self._pid))
