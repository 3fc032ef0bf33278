"""Processes as `/proc` shows them: who descends from whom, and how to end exactly those.

A process is named by its pid and its start time, because pids come round again. Linux only, as Ray's own
clean-up is: there `prctl` ties children to this process, and brings orphans of theirs back to it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

# A process in an uninterruptible wait outlives SIGKILL; what waits for it must not wait for ever.
UNKILLABLE_SECONDS = 10.0

_prctl = ctypes.CDLL(None, use_errno=True).prctl


@dataclass(frozen=True, order=True)
class Process:
    """`started` is in clock ticks since boot, as `/proc` has it."""

    pid: int
    started: int


@dataclass(frozen=True)
class Status:
    process: Process
    parent: int
    session: int
    zombie: bool


def status(pid: int) -> Status | None:
    """None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in brackets may hold spaces and brackets of its own: count fields from its end.
    fields = text.rpartition(")")[2].split()
    return Status(Process(pid, int(fields[19])), int(fields[1]), int(fields[3]), fields[0] in "ZX")


def all_processes() -> dict[int, Status]:
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return {pid: found for pid in pids if (found := status(pid)) is not None}


def this_process() -> Process:
    found = status(os.getpid())
    assert found is not None
    return found.process


def alive(process: Process) -> bool:
    found = status(process.pid)
    return found is not None and found.process == process and not found.zombie


def descendants(pids: Collection[int], table: Mapping[int, Status]) -> set[Process]:
    """The processes below `pids`, without themselves and without zombies."""
    children: dict[int, list[Status]] = {}
    for entry in table.values():
        children.setdefault(entry.parent, []).append(entry)
    found: set[Process] = set()
    waiting = list(pids)
    while waiting:
        for child in children.get(waiting.pop(), ()):
            if child.process not in found:
                found.add(child.process)
                waiting.append(child.process.pid)
    return {process for process in found if not table[process.pid].zombie}


def adopt_orphans() -> None:
    """Have what descends from this process stay below it when its parent ends, however often it forks."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(table: Mapping[int, Status], own: Collection[int]) -> None:
    """Clear away adopted children that have ended. `own` are waited for by whoever started them."""
    for entry in table.values():
        if entry.zombie and entry.parent == os.getpid() and entry.process.pid not in own:
            os.waitpid(entry.process.pid, os.WNOHANG)


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path | int) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, so that Ctrl-C in a terminal reaches this process only.

    It is sent SIGTERM when the thread that called this ends, even by kill -9: call it from the main thread.
    `log` is a file to append its output to, or a descriptor.
    """
    parent = os.getpid()

    def tie_to_parent() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # ended between fork and prctl
            os._exit(1)

    output = log if isinstance(log, int) else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=tie_to_parent,
        )
    finally:
        if not isinstance(log, int):
            os.close(output)


def end(
    roots: Iterable[Process],
    grace_seconds: float,
    *,
    below: Iterable[Process] = (),
    hurry: Callable[[], bool] = lambda: False,
) -> set[Process]:
    """SIGTERM to the roots; once they have ended, to what is left below them; SIGKILL when the grace is over.

    `below` are descendants that may have lost their way up. `hurry` ends the grace early. Returns what had to
    be killed. Touches nothing that is not named here or was not seen to descend from what is.
    """
    roots = set(roots)
    tree = roots | set(below)
    told: set[Process] = set()
    killed: set[Process] = set()
    deadline = time.monotonic() + grace_seconds
    while True:
        table = all_processes()
        tree |= descendants([process.pid for process in tree if in_table(process, table)], table)
        left = {process for process in tree if in_table(process, table) and not table[process.pid].zombie}
        late = time.monotonic() - deadline
        if not left or late > UNKILLABLE_SECONDS:
            return killed
        if late > 0 or hurry():
            deadline = min(deadline, time.monotonic())
            killed |= left
            _signal(left, signal.SIGKILL)
        else:
            _signal((left & roots or left) - told, signal.SIGTERM)
            told |= left & roots or left
        time.sleep(0.05)


def in_table(process: Process, table: Mapping[int, Status]) -> bool:
    return process.pid in table and table[process.pid].process == process


def _signal(processes: Iterable[Process], number: signal.Signals) -> None:
    for process in processes:
        if alive(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
