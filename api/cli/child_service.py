"""Runs `pathswitch up` as a child process, on free ports, and stops it at the end. For `demo` and `study`."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from api.cli.errors import CliError
from api.cli.up import processes

READY = "pathswitch: ready"
START_SECONDS = 300.0


class ChildService:
    """Runs the service while the block runs. Raises CliError if it does not become ready."""

    def __init__(
        self, home: Path, on_line: Callable[[str], None], settings: Mapping[str, str] | None = None
    ) -> None:
        """``on_line`` gets each line of output.

        ``settings`` are environment variables to add to this process's.
        """
        self._home = home
        self._on_line = on_line
        self._settings = dict(settings or {})
        self._started = threading.Event()  # set when the service is ready or has ended
        self.api_url = ""
        self.inference_url = ""

    def __enter__(self) -> Self:
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "api.cli.main", "up", "--home", str(self._home)]
        environment = os.environ | {"PYTHONSAFEPATH": "1"} | self._settings
        self._child = processes.spawn(
            [*command, "--api-port", "0", "--serve-port", "0"], environment, writing
        )
        os.close(writing)
        self._reader = threading.Thread(target=self._relay, args=(reading,), daemon=True)
        self._reader.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def wait(self) -> None:
        """Wait until the service ends, or KeyboardInterrupt."""
        self._child.wait()

    def _wait_until_ready(self) -> None:
        if not self._started.wait(START_SECONDS):
            raise CliError(
                f"the service is not ready after {START_SECONDS:.0f} s",
                f"Its logs are in {self._home / 'logs'}.",
            )
        if self._child.poll() is not None:
            raise CliError("the service did not start", f"Its logs are in {self._home / 'logs'}.")
        urls = json.loads((self._home / "processes.json").read_text())["urls"]
        self.api_url, self.inference_url = urls["api"], urls["serve"]

    def _relay(self, descriptor: int) -> None:
        with os.fdopen(descriptor, errors="replace") as lines:
            for line in lines:
                self._on_line(line.rstrip("\n"))
                if line.startswith(READY):
                    self._started.set()
        self._child.wait()
        self._started.set()

    def _stop(self) -> None:
        """Send SIGTERM and wait for `up` to end.

        Each Ctrl-C sends it again; the second one makes `up` kill its parts.
        """
        while self._child.poll() is None:
            try:
                self._child.send_signal(signal.SIGTERM)
                self._child.wait()
            except KeyboardInterrupt:
                continue
        self._reader.join()


def raise_on_sigterm() -> None:
    """Make SIGTERM unwind the stack, as Ctrl-C does, so that context managers clean up."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
