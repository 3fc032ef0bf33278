"""The campaign itself, cut short: `make chaos` is the whole of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.postgres import require_server

ROOT = Path(__file__).parents[2]


def campaign(*arguments: str) -> str:
    """What it prints. In a process of its own, as it forks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_at_some_of_the_points_and_by_signals_it_ends_as_the_undisturbed_one():
    told = campaign("--minutes", "0.5", "--database", "sqlite", "--only", "crash-points", "--only", "signals")
    assert told.count(": passed") == 2


def test_with_a_database_whose_calls_fail_it_ends_as_the_undisturbed_one():
    told = campaign("--minutes", "1", "--database", "sqlite", "--only", "faults")
    assert told.count(": passed") == 1


@pytest.mark.slow
@pytest.mark.postgres
def test_all_of_it_on_postgresql_cut_short():
    require_server()
    told = campaign("--minutes", "2", "--database", "postgresql")
    assert told.count(": passed") == 6


@pytest.mark.slow
def test_the_clock_of_a_host_is_moved():
    told = campaign("--minutes", "5", "--database", "sqlite", "--only", "clock")
    assert told.count(": passed") == 2
