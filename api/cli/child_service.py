"""A `pathswitch up` of one's own: a child on free ports, its lines passed on, stopped with all it started."""

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
    """Runs while the block does. Raises CliError where it does not become ready."""

    def __init__(
        self, home: Path, tell: Callable[[str], None], settings: Mapping[str, str] | None = None
    ) -> None:
        """``settings``: environment variables of its own beside this process's."""
        self._home = home
        self._tell = tell
        self._settings = dict(settings or {})
        self._settled = threading.Event()  # it is ready, or it has ended
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
        """Until it ends by itself, or KeyboardInterrupt."""
        self._child.wait()

    def _wait_until_ready(self) -> None:
        if not self._settled.wait(START_SECONDS):
            raise CliError(f"the service is not ready after {START_SECONDS:.0f} s")
        if self._child.poll() is not None:
            raise CliError("the service did not start", f"Its logs are in {self._home / 'logs'}.")
        urls = json.loads((self._home / "processes.json").read_text())["urls"]
        self.api_url, self.inference_url = urls["api"], urls["serve"]

    def _relay(self, descriptor: int) -> None:
        with os.fdopen(descriptor, errors="replace") as lines:
            for line in lines:
                self._tell(line.rstrip("\n"))
                if line.startswith(READY):
                    self._settled.set()
        self._child.wait()
        self._settled.set()

    def _stop(self) -> None:
        """As patient as `up` itself is. Ctrl-C meanwhile has it end at once."""
        while self._child.poll() is None:
            try:
                self._child.send_signal(signal.SIGTERM)
                self._child.wait()
            except KeyboardInterrupt:
                continue
        self._reader.join()


def raise_on_sigterm() -> None:
    """Have SIGTERM unwind the stack, as Ctrl-C does, so that what runs in a block is stopped at its end."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
