"""The process table, descendants, and ending exactly those."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from api.cli.up import processes
from api.cli.up.processes import Process

# Starts a child that sleeps, prints the child's pid and waits for it. SIGTERM ends both; "deaf" ignores it.
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
        child_pid = int(parent.stdout.readline())
        try:
            child, found = processes.status(child_pid), processes.status(parent.pid)
            assert child is not None
            assert found is not None
            yield found.process, child.process
        finally:
            for pid in (parent.pid, child_pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_descendants_are_found_at_any_depth_without_zombies() -> None:
    with parent_and_child() as (parent, child):
        assert processes.descendants([os.getpid()], processes.all_processes()) >= {parent, child}
        assert processes.descendants([parent.pid], processes.all_processes()) == {child}
        os.kill(child.pid, signal.SIGSTOP)
        os.kill(parent.pid, signal.SIGSTOP)
        os.kill(child.pid, signal.SIGKILL)  # a zombie until its stopped parent waits for it
        deadline = time.monotonic() + 10
        while processes.alive(child):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert child.pid in processes.all_processes()
        assert processes.descendants([parent.pid], processes.all_processes()) == set()


def test_a_start_time_is_the_one_in_proc_as_earlier_releases_recorded_it() -> None:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert processes.this_process() == Process(os.getpid(), int(fields[19]))


def test_a_reused_pid_is_another_process() -> None:
    me = processes.this_process()
    assert processes.alive(me)
    assert not processes.alive(Process(me.pid, me.started - 1))


def test_descendants_end_with_their_root_and_bystanders_do_not() -> None:
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


def test_processes_that_outlast_the_grace_period_are_killed() -> None:
    with parent_and_child("deaf") as (parent, child):
        assert processes.end([parent], 0.3) == {parent, child}
        assert not processes.alive(child)


def test_a_hurry_ends_the_grace_period_early() -> None:
    with parent_and_child("deaf") as (parent, _):
        start = time.monotonic()
        processes.end([parent], 60, hurry=lambda: time.monotonic() - start > 0.2)
        assert time.monotonic() - start < 10


def test_descendants_whose_parent_has_ended_end_too() -> None:
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
