"""The lock on a home, and the record of the processes started on it: `<home>/lock` and `<home>/processes.json`.

The lock is released whenever its holder ends. The record survives a holder that was killed, so that the next
one can end the processes that it left behind.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from api.cli.errors import CliError
from api.cli.up import processes
from api.cli.up.processes import Process

LEFTOVER_GRACE_SECONDS = 10.0


class HomeInUse(CliError):
    def __init__(self, home: Path, owner: int | None) -> None:
        other = "another `pathswitch up`" + (f" (process {owner})" if owner else "")
        super().__init__(
            f"{other} is running on the home {home}",
            "Stop it, or choose another home with --home or PATHSWITCH_HOME.",
        )


class HomeLock:
    """Holds the lock on a home while the block runs. Raises HomeInUse."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._home / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise HomeInUse(self._home, _owner(self._home)) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


class ProcessRecord:
    """`processes.json`: the owner, the parts it started, their descendants, and the URLs of the service."""

    def __init__(self, home: Path, urls: Mapping[str, str] | None = None) -> None:
        self._path = home / "processes.json"
        self._urls = dict(urls or {})
        self._written: object = None

    def write(self, parts: Mapping[str, Process], descendants: Iterable[Process]) -> None:
        content = {
            "boot": _boot(),
            "owner": _row(processes.this_process()),
            "urls": self._urls,
            "parts": {name: _row(process) for name, process in parts.items()},
            "descendants": [_row(process) for process in sorted(descendants)],
        }
        if content == self._written:
            return
        new_file = self._path.with_suffix(".new")
        new_file.write_text(json.dumps(content, indent=1))
        new_file.replace(self._path)
        self._written = content

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def leftovers(self) -> set[Process]:
        """Running processes of the last owner: its parts, their descendants and members of their sessions."""
        content = _read(self._path)
        if content is None or content["boot"] != _boot():  # pids from before a reboot are meaningless
            return set()
        rows = [*content["parts"].values(), *content["descendants"]]
        running = {process for process in (Process(*row) for row in rows) if processes.alive(process)}
        # Every part leads a session. If the leader is still alive, the session is ours; otherwise its id may have
        # been reused by an unrelated process.
        sessions = {process.pid for process in running}
        table = processes.all_processes()
        running |= {
            entry.process for entry in table.values() if entry.session in sessions and not entry.zombie
        }
        return running | processes.descendants([process.pid for process in running], table)


def end_leftovers(home: Path) -> int:
    """End the processes that a killed owner left behind, and return their number. Call it under the lock."""
    record = ProcessRecord(home)
    leftovers = record.leftovers()
    processes.end(leftovers, LEFTOVER_GRACE_SECONDS)
    record.remove()
    return len(leftovers)


def _row(process: Process) -> list[int]:
    return [process.pid, process.started]


def _owner(home: Path) -> int | None:
    content = _read(home / "processes.json")
    return None if content is None else int(content["owner"][0])


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
