"""The record of started processes, and the lock on a home."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.cli.up import processes
from api.cli.up.processes import Process
from api.cli.up.record import HomeInUse, HomeLock, ProcessRecord, end_leftovers


@pytest.fixture
def sleeper() -> Iterator[Process]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        found = processes.status(child.pid)
        assert found is not None
        yield found.process
        child.kill()


def test_a_home_has_one_owner_and_the_error_names_it(tmp_path: Path) -> None:
    with HomeLock(tmp_path):
        ProcessRecord(tmp_path).write({}, [])
        with pytest.raises(HomeInUse, match=rf"process {processes.this_process().pid}\)"), HomeLock(tmp_path):
            pass
    with HomeLock(tmp_path):
        pass


def test_leftovers_are_ended_by_pid_and_start_time(tmp_path: Path, sleeper: Process) -> None:
    ProcessRecord(tmp_path).write({"ray": sleeper}, [])
    assert end_leftovers(tmp_path) == 1
    assert not processes.alive(sleeper)
    assert not (tmp_path / "processes.json").exists()


def test_a_process_that_reuses_a_recorded_pid_is_left_alone(tmp_path: Path, sleeper: Process) -> None:
    ProcessRecord(tmp_path).write({"ray": Process(sleeper.pid, sleeper.started - 1)}, [])
    assert end_leftovers(tmp_path) == 0
    assert processes.alive(sleeper)


def test_pids_from_before_a_reboot_are_ignored(tmp_path: Path, sleeper: Process) -> None:
    ProcessRecord(tmp_path).write({"ray": sleeper}, [])
    file = tmp_path / "processes.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"boot": "another"}))
    assert end_leftovers(tmp_path) == 0
    assert processes.alive(sleeper)


def test_a_home_without_a_record_has_no_leftovers(tmp_path: Path) -> None:
    assert end_leftovers(tmp_path) == 0


def test_the_record_holds_urls_parts_and_descendants(tmp_path: Path, sleeper: Process) -> None:
    ProcessRecord(tmp_path, {"api": "http://127.0.0.1:1"}).write({"ray": sleeper}, [Process(7, 7)])
    content = json.loads((tmp_path / "processes.json").read_text())
    assert content["urls"] == {"api": "http://127.0.0.1:1"}
    assert content["parts"] == {"ray": [sleeper.pid, sleeper.started]}
    assert content["descendants"] == [[7, 7]]
