"""Finds the descendants of a process and ends exactly those.

A process is identified by its pid and start time, because the kernel reuses pids. Linux only, as Ray's own
clean-up is: ``prctl`` ties children to this process and hands their orphans back to it.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

# A process in an uninterruptible wait survives SIGKILL, so waiting for it must have a limit.
UNKILLABLE_SECONDS = 10.0

_prctl = ctypes.CDLL(None, use_errno=True).prctl


@dataclass(frozen=True, order=True)
class Process:
    """Identifies a process, also across reuse of its pid. ``started`` is in clock ticks since boot."""

    pid: int
    started: int


@dataclass(frozen=True)
class Status:
    """A process as it was when the process table was read."""

    handle: psutil.Process
    parent: int
    session: int
    zombie: bool

    @cached_property
    def process(self) -> Process:
        """The process's identity, computed on demand: psutil reads all of /proc/stat for a start time."""
        # The kernel counts ticks since boot. psutil adds the boot time, which changes when the clock is set.
        seconds_since_boot = self.handle.create_time() - psutil.boot_time()
        return Process(self.handle.pid, round(seconds_since_boot * TICKS_PER_SECOND))


def status(pid: int) -> Status | None:
    """Look a process up. Returns None if it does not exist or this user may not see it."""
    try:
        handle = psutil.Process(pid)
        with handle.oneshot():
            zombie = handle.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return Status(handle, handle.ppid(), os.getsid(pid), zombie)
    except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
        return None


def all_processes() -> dict[int, Status]:
    """Read the process table."""
    return {pid: found for pid in psutil.pids() if (found := status(pid)) is not None}


def this_process() -> Process:
    found = status(os.getpid())
    assert found is not None
    return found.process


def alive(process: Process) -> bool:
    """Whether the process still runs. A zombie does not."""
    found = status(process.pid)
    return found is not None and found.process == process and not found.zombie


def descendants(pids: Collection[int], table: Mapping[int, Status]) -> set[Process]:
    """The descendants of ``pids``, without zombies and without ``pids`` themselves."""
    children: dict[int, list[Status]] = {}
    for entry in table.values():
        children.setdefault(entry.parent, []).append(entry)
    found: set[Process] = set()
    pending = list(pids)
    while pending:
        for child in children.get(pending.pop(), ()):
            if child.process not in found:
                found.add(child.process)
                pending.append(child.process.pid)
    return {process for process in found if not table[process.pid].zombie}


def adopt_orphans() -> None:
    """Make this process adopt every orphaned descendant, however often it forked."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(table: Mapping[int, Status], own: Collection[int]) -> None:
    """Reap adopted children that have ended. ``own`` are the pids whose starter waits for them itself."""
    for entry in table.values():
        if entry.zombie and entry.parent == os.getpid() and entry.handle.pid not in own:
            os.waitpid(entry.handle.pid, os.WNOHANG)


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path | int) -> subprocess.Popen[bytes]:
    """Start a command in its own session, so that Ctrl-C in a terminal reaches this process only.

    The kernel sends it SIGTERM when the calling thread ends, even by kill -9, so call this from the main thread.
    ``log`` is a file to append its output to, or a file descriptor.
    """
    parent = os.getpid()

    def tie_to_parent() -> None:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # the parent ended between fork and prctl
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
    """End the roots and all their descendants. Returns the processes that had to be killed.

    The roots get SIGTERM first; once they have ended, their remaining descendants do; after the grace period,
    everything that still runs gets SIGKILL. ``below`` names descendants whose parent may have ended, and
    ``hurry`` ends the grace period early. No other process receives a signal.
    """
    roots = set(roots)
    tree = roots | set(below)
    signalled: set[Process] = set()
    killed: set[Process] = set()
    deadline = time.monotonic() + grace_seconds
    while True:
        table = all_processes()
        tree |= descendants([process.pid for process in tree if in_table(process, table)], table)
        running = {process for process in tree if in_table(process, table) and not table[process.pid].zombie}
        overdue_seconds = time.monotonic() - deadline
        if not running or overdue_seconds > UNKILLABLE_SECONDS:
            return killed
        if overdue_seconds > 0 or hurry():
            deadline = min(deadline, time.monotonic())
            killed |= running
            _signal(running, signal.SIGKILL)
        else:
            targets = running & roots or running
            _signal(targets - signalled, signal.SIGTERM)
            signalled |= targets
        time.sleep(0.05)


def in_table(process: Process, table: Mapping[int, Status]) -> bool:
    return process.pid in table and table[process.pid].process == process


def _signal(processes: Iterable[Process], number: signal.Signals) -> None:
    for process in processes:
        if alive(process):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
