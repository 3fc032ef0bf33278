"""The campaign itself, cut short: `make chaos` is the whole of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import suite
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


def test_the_ordinary_tests_of_a_whole_update_hold_while_calls_to_the_database_fail(tmp_path):
    tests = ("tests/service/orchestrator/test_update.py", "tests/api/test_datasets.py")
    report = suite.run("sqlite", tmp_path, tests=tests)
    assert report.problems == []
    figures = report.figures
    assert figures["tests under faults"] >= 30
    assert figures["tests excluded, each time"] == 0
    assert figures["calls"] > 5000
    assert figures["failed before they were done"] > 0
    assert figures["done but reported failed"] > 0


def test_without_a_call_that_fails_the_ordinary_tests_are_not_passed(tmp_path):
    """They pass all the same: what was to be tested was not."""
    report = suite.run("sqlite", tmp_path, tests=("tests/api/test_openapi.py", "-k", "browser"))
    assert report.figures["tests under faults"] == 1
    assert report.figures["failed before they were done"] == 0
    assert report.problems == ["seed 1: pytest ended with 1"]


@pytest.mark.slow
@pytest.mark.postgres
def test_all_of_it_on_postgresql_cut_short():
    require_server()
    told = campaign("--minutes", "2", "--database", "postgresql")
    assert told.count(": passed") == 7


@pytest.mark.slow
def test_the_clock_of_a_host_is_moved():
    told = campaign("--minutes", "5", "--database", "sqlite", "--only", "clock")
    assert told.count(": passed") == 2
