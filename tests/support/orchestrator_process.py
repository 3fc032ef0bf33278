"""Runs the orchestrator as a separate process, so that tests can send it signals."""

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from service.settings import READY_FILE_VARIABLE, Settings

START_SECONDS = 90.0
STOP_SECONDS = 30.0


@contextmanager
def orchestrator_process(
    settings: Settings, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``python -m service.main`` and yield once its serving is ready. At the end it must stop on SIGTERM."""
    ready = settings.home / "orchestrator.ready"
    ready.unlink(missing_ok=True)
    variables = settings.environment() | {READY_FILE_VARIABLE: str(ready)} | dict(environment or {})
    with (settings.home / "orchestrator.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service.main"], env=variables, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready.exists():
            assert process.poll() is None, "the orchestrator ended; see orchestrator.log in its home"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def stop(process: subprocess.Popen[bytes]) -> float:
    """Send SIGTERM and wait for the process to end. Returns the seconds that it took."""
    began = time.monotonic()
    process.terminate()
    process.wait(STOP_SECONDS)
    return time.monotonic() - began
