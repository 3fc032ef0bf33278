"""Supervises the parts of `up`: starts them in order of need, restarts those that die, stops them at the end.

There is one loop on the main thread, because children end with the thread that started them. Each pass
compares the actual state of every part with the desired one and takes the next step.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from api.cli.errors import CliError
from api.cli.up import processes
from api.cli.up.processes import Process
from api.cli.up.record import ProcessRecord

TICK_SECONDS = 0.2
WATCH_SECONDS = 1.0
START_SECONDS = 240.0  # Ray alone took 24 s on two busy cores
MAX_STARTS = 3
MAX_BACKOFF_SECONDS = 30.0
STABLE_SECONDS = 60.0
TAIL_LINES = 15
UNMET_NEED_GRACE_SECONDS = 2.0
STRAY_GRACE_SECONDS = 1.0

Say = Callable[[str, str], None]
"""Prints a line about a part. Takes its name and a text."""


@dataclass(eq=False)
class Part:
    """A part of the service. It runs as a child process or, without a `command`, inside another part."""

    name: str
    ready: Callable[[], bool]
    describe: Callable[[], str]
    log: Path
    command: Callable[[], Sequence[str]] | None = None
    environment: Callable[[], Mapping[str, str]] = dict
    prepare: Callable[[], None] = lambda: None  # called before every start
    needs: tuple["Part", ...] = ()
    grace_seconds: float = 10.0

    # Its current state.
    child: subprocess.Popen[bytes] | None = None
    process: Process | None = None
    # All descendants, including those whose parents have ended.
    tree: set[Process] = field(default_factory=set)
    started_with: Mapping[str, str] = field(default_factory=dict)
    log_start: int = 0
    started_at: float = 0.0
    start_at: float = 0.0
    failures: int = 0
    is_ready: bool = False


class Supervisor:
    """Runs the parts until a signal arrives. `parts` are in start order."""

    def __init__(
        self, parts: Sequence[Part], record: ProcessRecord, say: Say, announce: Callable[[], None]
    ) -> None:
        self._parts = parts
        self._record = record
        self._say = say
        self._announce = announce
        self._stopping = threading.Event()
        self._signals = 0
        self._watched_at = 0.0
        self._complete = False  # all parts are ready
        self._once_complete = False

    def run(self) -> None:
        """Run until SIGTERM, SIGINT or SIGHUP, then end all parts.

        Raises CliError if a part does not start.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        processes.adopt_orphans()
        try:
            while not self._stopping.is_set():
                for part in self._parts:
                    self._tend(part)
                self._note_completeness()
                if time.monotonic() - self._watched_at > WATCH_SECONDS:
                    self._watch()
                self._stopping.wait(TICK_SECONDS)
        finally:
            self._stop()

    def _on_signal(self, number: int, frame: object) -> None:
        self._signals += 1
        self._stopping.set()

    def _tend(self, part: Part) -> None:
        """Take a part one step closer to running and ready."""
        if not all(need.is_ready for need in part.needs):
            # Without its needs it could not finish its work, only wait for them.
            self._end(part, grace_seconds=UNMET_NEED_GRACE_SECONDS)
        elif part.command is None or self._runs(part):
            part.started_at = part.started_at or time.monotonic()
            if part.is_ready:
                return
            if part.ready():
                part.is_ready = True
                self._say(part.name, part.describe())
            elif time.monotonic() - part.started_at > START_SECONDS:
                self._note_failure(part, f"is not ready after {START_SECONDS:.0f} s")

    def _runs(self, part: Part) -> bool:
        """Whether the part runs with its current environment.

        Starts it if it does not, once its backoff is over.
        """
        if part.child is None:
            if time.monotonic() >= part.start_at:
                self._start(part)
        elif (code := part.child.poll()) is not None:
            cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
            self._note_failure(part, f"ended with {cause}")
        elif part.environment() != part.started_with:
            self._end(part)
        else:
            return True
        return False

    def _start(self, part: Part) -> None:
        assert part.command is not None
        part.prepare()
        part.started_with = part.environment()
        part.log_start = part.log.stat().st_size if part.log.exists() else 0
        part.child = processes.spawn(part.command(), part.started_with, part.log)
        found = processes.status(part.child.pid)
        assert found is not None, "a child exists until it is waited for"
        part.process = found.process
        part.started_at = time.monotonic()
        self._watch()

    def _note_failure(self, part: Part, what: str) -> None:
        """End the part and schedule its restart.

        Raises CliError if the service never became ready and it failed too often.
        """
        uptime = time.monotonic() - part.started_at
        part.failures = 1 if part.is_ready and uptime > STABLE_SECONDS else part.failures + 1
        if not self._once_complete and part.failures >= MAX_STARTS:
            raise CliError(f"{part.name} {what}", self._tail(part))
        wait = min(2.0 ** (part.failures - 1), MAX_BACKOFF_SECONDS)
        self._say(part.name, f"{what}; restarting in {wait:.0f} s (log: {part.log})")
        self._end(part)
        part.start_at = time.monotonic() + wait

    def _end(self, *parts: Part, grace_seconds: float | None = None) -> None:
        """End these parts together, with all their descendants.

        Parts that need them are ended by their own step.
        """
        roots = [part.process for part in parts if part.process is not None]
        if roots:
            processes.end(
                roots,
                max(part.grace_seconds for part in parts) if grace_seconds is None else grace_seconds,
                below=set().union(*(part.tree for part in parts)),
                hurry=lambda: self._signals > 1,
            )
        for part in parts:
            part.is_ready, part.started_at = False, 0.0
            if part.child is not None:
                part.child.wait()
                part.child, part.process, part.tree = None, None, set()

    def _note_completeness(self) -> None:
        """Announce it whenever all parts have become ready."""
        complete = all(part.is_ready for part in self._parts)
        if complete and not self._complete:
            self._announce()
        self._complete = complete
        self._once_complete |= complete

    def _watch(self) -> None:
        """Update and record the descendants of each part, and reap adopted children that have ended."""
        table = processes.all_processes()
        running = {part.name: part.process for part in self._parts if part.process is not None}
        for part in self._parts:
            if part.process is not None:
                part.tree = {process for process in part.tree if processes.in_table(process, table)}
                pids = [part.process.pid, *(process.pid for process in part.tree)]
                part.tree |= processes.descendants(pids, table)
        # Orphans that no pass has seen below a part were adopted by this process, and are recorded too.
        self._record.write(running, processes.descendants([os.getpid()], table) - set(running.values()))
        processes.reap_orphans(table, {process.pid for process in running.values()})
        self._watched_at = time.monotonic()

    def _stop(self) -> None:
        """End everything: first the parts that no other part needs, together, then those that they needed."""
        self._watch()
        remaining = [part for part in reversed(self._parts) if part.child is not None]
        while remaining:
            needed = {need for part in remaining for need in part.needs}
            ending = [part for part in remaining if part not in needed]
            for part in ending:
                self._say(part.name, "stopping")
            self._end(*ending)
            remaining = [part for part in remaining if part in needed]
        strays = processes.descendants([os.getpid()], processes.all_processes())
        processes.end(strays, STRAY_GRACE_SECONDS, hurry=lambda: self._signals > 1)
        processes.reap_orphans(processes.all_processes(), ())
        self._record.remove()

    def _tail(self, part: Part) -> str:
        """The last lines of the part's log since its last start."""
        if not part.log.exists():
            return ""
        with part.log.open("rb") as file:
            file.seek(part.log_start)
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join([*lines[-TAIL_LINES:], f"(full log: {part.log})"])
