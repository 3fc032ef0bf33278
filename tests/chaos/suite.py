"""The ordinary tests of orchestrator, API and whole updates, while calls to the database fail: ``tests.support.fault_mode``."""

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
OF_KIND = {"sqlite": "not slow and not postgres", "postgresql": "not slow and postgres"}
FAILURES_SHOWN = 20


def run(
    kind: str, folder: Path, *, tests: Sequence[str] = TESTS, seeds: int = 1, first_seed: int = 1
) -> Report:
    """Run the tests of a kind of database once for every seed, in a process of their own."""
    report = Report(f"the ordinary tests while {RATE:.0%} of database calls fail, {kind}")
    total, ran, excluded = FaultCounts(), 0, 0
    began = time.monotonic()
    for seed in range(first_seed, first_seed + seeds):
        counted = folder / f"suite-{kind}-{seed}.json"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-n0", "-q", "--tb=line", "-m", OF_KIND[kind]),
                *(f"--database-faults={RATE}", f"--faults-seed={seed}", f"--faults-report={counted}"),
                *tests,
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        report.problems += [f"seed {seed}: {line}" for line in failures[:FAILURES_SHOWN]]
        report.require(done.returncode == 0, f"seed {seed}: pytest ended with {done.returncode}")
        if not counted.exists():
            report.problems.append(f"seed {seed}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
            continue
        figures = json.loads(counted.read_text())
        ran, excluded = ran + figures.pop("tests"), figures.pop("excluded")
        total.add(FaultCounts(**figures))
    report.figures = {
        "seeds": seeds,
        "tests under faults": ran,
        "tests excluded, each time": excluded,
        "calls": total.calls,
        "failed before they were done": total.before,
        "done but reported failed": total.after,
        "of those commits": total.after_commit,
        "seconds": time.monotonic() - began,
    }
    return report
