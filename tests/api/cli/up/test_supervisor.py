"""The supervisor keeps parts running, and ends them with all their descendants in every case."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from api.cli.up import processes
from api.cli.up.processes import Process
from api.cli.up.record import end_leftovers

PATIENCE_SECONDS = 20.0


class Supervised:
    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.api.cli.up.supervised", str(home), *arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.lines = self.process.stdout

    def read_until(self, text: str) -> list[str]:
        found = []
        while not found or text not in found[-1]:
            line = self.lines.readline()
            assert line, f"the process ended after {found}"
            found.append(line.rstrip())
        return found

    def recorded(self) -> tuple[dict[str, Process], set[Process]]:
        content = json.loads((self.home / "processes.json").read_text())
        parts = {name: Process(*row) for name, row in content["parts"].items()}
        return parts, {Process(*row) for row in content["descendants"]}


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    running = Supervised(tmp_path)
    yield running
    if running.process.poll() is None:
        running.process.terminate()
    running.process.wait(PATIENCE_SECONDS)
    running.lines.close()


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_part_starts_after_what_it_needs(supervised: Supervised) -> None:
    assert supervised.read_until("all") == ["base: is up", "upper: is up", "all: ready"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_in_reverse_order(supervised: Supervised, number: signal.Signals) -> None:
    supervised.read_until("all")
    wait_until(lambda: len(supervised.recorded()[1]) == 2)  # the supervisor has seen the orphan
    parts, below = supervised.recorded()
    supervised.process.send_signal(number)
    assert supervised.process.wait(PATIENCE_SECONDS) == 0
    assert supervised.lines.read().splitlines() == ["upper: stopping", "base: stopping"]
    assert not any(processes.alive(one) for one in (*parts.values(), *below))
    assert not (supervised.home / "processes.json").exists()


def test_a_new_orphan_ends_too(supervised: Supervised) -> None:
    """Even if the supervisor has not seen it below its part."""
    supervised.read_until("base")
    below = processes.descendants([supervised.process.pid], processes.all_processes())
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.process.wait(PATIENCE_SECONDS) == 0
    assert len(below) >= 2
    assert not any(processes.alive(process) for process in below)


def test_a_part_that_dies_is_restarted_with_the_parts_that_need_it(supervised: Supervised) -> None:
    supervised.read_until("all")
    wait_until(lambda: len(supervised.recorded()[1]) == 2)
    parts, _ = supervised.recorded()
    below = processes.descendants([parts["base"].pid], processes.all_processes())
    os.kill(parts["base"].pid, signal.SIGKILL)
    lines = supervised.read_until("all")
    assert lines[0].startswith("base: ended with signal SIGKILL; restarting in 1 s (log: ")
    assert lines[1:] == ["base: is up", "upper: is up", "all: ready"]
    assert len(below) == 1
    assert not any(processes.alive(one) for one in (*parts.values(), *below))


def test_after_kill_9_the_next_owner_ends_the_leftovers(supervised: Supervised) -> None:
    supervised.read_until("all")
    wait_until(lambda: len(supervised.recorded()[1]) == 2)
    parts, below = supervised.recorded()
    supervised.process.kill()
    supervised.process.wait()
    assert any(processes.alive(one) for one in below), "the orphan must outlive the supervisor"
    assert end_leftovers(supervised.home) >= 1
    assert not any(processes.alive(one) for one in (*parts.values(), *below))


def test_a_part_that_never_starts_is_given_up_with_the_end_of_its_log(tmp_path: Path) -> None:
    running = Supervised(tmp_path, "broken")
    assert running.process.wait(PATIENCE_SECONDS) == 1
    lines = running.lines.read().splitlines()
    running.lines.close()
    assert len([line for line in lines if "restarting in" in line]) == 2
    assert "pathswitch: base ended with status 1" in lines
    assert "  there is no such thing" in lines
