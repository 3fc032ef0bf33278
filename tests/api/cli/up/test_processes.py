"""Processes, those below them, and how exactly those are ended."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from api.cli.up import processes
from api.cli.up.processes import Process, Status, descendants

# Starts a child that sleeps, tells its pid, and waits for it; SIGTERM ends both where it is not ignored.
PARENT = """
import signal, subprocess, sys
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
child.wait()
"""


@contextmanager
def parent_and_child(*arguments: str) -> Iterator[tuple[Process, Process]]:
    command = [sys.executable, "-c", PARENT, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = processes.status(int(parent.stdout.readline()))
        found = processes.status(parent.pid)
        assert child is not None
        assert found is not None
        yield found.process, child.process
        for process in (found.process, child.process):
            if processes.alive(process):
                os.kill(process.pid, signal.SIGKILL)


def test_descendants_are_found_at_any_depth_and_zombies_left_out() -> None:
    def entry(pid: int, parent: int, *, zombie: bool = False) -> Status:
        return Status(Process(pid, 1), parent, 1, zombie)

    table = {
        one.process.pid: one
        for one in (entry(2, 1), entry(3, 2), entry(4, 3, zombie=True), entry(5, 4), entry(6, 1))
    }
    assert descendants([2], table) == {Process(3, 1), Process(5, 1)}


def test_a_pid_that_has_come_round_is_another_process() -> None:
    me = processes.this_process()
    assert processes.alive(me)
    assert not processes.alive(Process(me.pid, me.started - 1))


def test_what_a_process_started_ends_with_it() -> None:
    with parent_and_child() as (parent, child):
        bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        try:
            assert processes.end([parent], 10) == set()
            assert not processes.alive(parent)
            assert not processes.alive(child)
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()


def test_what_does_not_end_in_its_grace_is_killed() -> None:
    with parent_and_child("deaf") as (parent, child):
        assert processes.end([parent], 0.3) == {parent, child}
        assert not processes.alive(child)


def test_a_hurry_ends_the_grace() -> None:
    with parent_and_child("deaf") as (parent, _):
        start = time.monotonic()
        processes.end([parent], 60, hurry=lambda: time.monotonic() - start > 0.2)
        assert time.monotonic() - start < 10


def test_descendants_whose_parent_has_ended_are_ended_too() -> None:
    with parent_and_child() as (parent, child):
        os.kill(parent.pid, signal.SIGKILL)
        processes.end([parent], 10, below=[child])
        assert not processes.alive(child)


def test_a_child_ends_with_its_parent_even_by_kill_9(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from api.cli.up import processes
command = [sys.executable, "-c", "import time; time.sleep(60)"]
child = processes.spawn(command, {}, Path(sys.argv[1]))
print(child.pid, flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        found = processes.status(int(parent.stdout.readline()))
        assert found is not None
        assert found.session == found.process.pid, "it leads a session of its own"
        parent.kill()
    deadline = time.monotonic() + 10
    while processes.alive(found.process):
        assert time.monotonic() < deadline
        time.sleep(0.02)
