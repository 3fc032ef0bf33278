"""A short version of the fault campaign that `make chaos` runs."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import suite
from tests.support.postgres import require_server

ROOT = Path(__file__).parents[2]


def campaign(*arguments: str) -> str:
    """Run the campaign and return its output. In a separate process, because it forks."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_kills_at_crash_points_and_by_signals_do_not_change_the_outcome() -> None:
    output = campaign(
        "--minutes", "0.5", "--database", "sqlite", "--only", "crash-points", "--only", "signals"
    )
    assert output.count(": passed") == 2


def test_failing_database_calls_do_not_change_the_outcome() -> None:
    output = campaign("--minutes", "1", "--database", "sqlite", "--only", "faults")
    assert output.count(": passed") == 1


def test_ordinary_tests_pass_while_database_calls_fail(tmp_path: Path) -> None:
    tests = ("tests/service/orchestrator/test_update.py", "tests/api/test_datasets.py")
    report = suite.run("sqlite", tmp_path, tests=tests)
    assert report.problems == []
    figures = report.figures
    assert int(figures["tests under faults"]) >= 30
    assert figures["tests excluded per seed"] == 0
    assert int(figures["calls"]) > 5000
    assert int(figures["failed before they executed"]) > 0
    assert int(figures["executed but reported a failure"]) > 0


def test_a_run_in_which_no_call_fails_is_reported_as_a_failure(tmp_path: Path) -> None:
    """Its tests pass, but it tested nothing."""
    report = suite.run("sqlite", tmp_path, tests=("tests/api/test_openapi.py", "-k", "browser"))
    assert report.figures["tests under faults"] == 1
    assert report.figures["failed before they executed"] == 0
    assert report.problems == ["seed 1: pytest ended with 1"]


@pytest.mark.slow
@pytest.mark.postgres
def test_a_short_campaign_passes_on_postgresql() -> None:
    require_server()
    output = campaign("--minutes", "2", "--database", "postgresql")
    assert output.count(": passed") == 7


@pytest.mark.slow
def test_a_moved_clock_does_not_change_the_outcome() -> None:
    output = campaign("--minutes", "5", "--database", "sqlite", "--only", "clock")
    assert output.count(": passed") == 2
