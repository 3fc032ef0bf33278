"""Runs the ordinary orchestrator, API and story tests while database calls fail (``tests.support.fault_mode``)."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.report import Report
from tests.support.database_faults import RATE, FaultCounts

ROOT = Path(__file__).parents[2]
TESTS = ("tests/service/orchestrator", "tests/api", "tests/story")
MARKERS = {"sqlite": "not slow and not postgres", "postgresql": "not slow and postgres"}
MAX_FAILURES = 20


def run(
    kind: str, folder: Path, *, tests: Sequence[str] = TESTS, seeds: int = 1, first_seed: int = 1
) -> Report:
    """Run the tests on one kind of database once per seed, each time in a new process."""
    report = Report(f"the ordinary tests while {RATE:.0%} of database calls fail, {kind}")
    total, num_tests, excluded = FaultCounts(), 0, 0
    began = time.monotonic()
    for seed in range(first_seed, first_seed + seeds):
        report_file = folder / f"suite-{kind}-{seed}.json"
        result = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-n0", "-q", "--tb=line", "-m", MARKERS[kind]),
                *(f"--database-faults={RATE}", f"--faults-seed={seed}", f"--faults-report={report_file}"),
                *tests,
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        failures = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        report.problems += [f"seed {seed}: {line}" for line in failures[:MAX_FAILURES]]
        report.require(result.returncode == 0, f"seed {seed}: pytest ended with {result.returncode}")
        if not report_file.exists():
            report.problems.append(f"seed {seed}: {result.stdout[-1000:]}{result.stderr[-1000:]}")
            continue
        figures = json.loads(report_file.read_text())
        num_tests, excluded = num_tests + figures.pop("tests"), figures.pop("excluded")
        total.add(FaultCounts(**figures))
    report.figures = {
        "seeds": seeds,
        "tests under faults": num_tests,
        "tests excluded per seed": excluded,
        "calls": total.calls,
        "failed before they executed": total.before,
        "executed but reported a failure": total.after,
        "of those, commits": total.after_commit,
        "seconds": time.monotonic() - began,
    }
    return report
