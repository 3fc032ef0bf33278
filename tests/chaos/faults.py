"""Runs a scenario while database calls fail at random. The outcome must equal that of an undisturbed run."""

import time
from pathlib import Path

from service.core import retry
from service.orchestrator.loop import Orchestrator
from service.store.database import Database
from tests.chaos.databases import Databases, add_line, opened, push, unfinished
from tests.chaos.report import Report
from tests.chaos.rows import differences, read_rows
from tests.chaos.world import FAILS_ONCE, GATED, OutsideExecutor, OutsideServing, Record, World
from tests.support.database_faults import RATE, FaultCounts, Faults

LEASE_SECONDS = 0.2
SCENARIO_SECONDS = 60.0
TICK_SECONDS = 0.005
FIRST_WAIT_SECONDS = 0.02


def run_scenario(url: str, root: Path, faults: Faults) -> tuple[dict[str, list[str]], Record]:
    """Run two updates of a line with one failed attempt, and one that the gate rejects, with one orchestrator."""
    world = World(str(root))
    with opened(url) as database:
        for name in (FAILS_ONCE, GATED):
            add_line(database, name)
            push(database, name, 1)
        push(database, FAILS_ONCE, 2)
        faulty = Database(url)
        faults.inject(faulty)
        orchestrator = Orchestrator(
            faulty, world.artifacts, OutsideExecutor(world), OutsideServing(world), "o", LEASE_SECONDS
        )
        deadline = time.monotonic() + SCENARIO_SECONDS
        try:
            while unfinished(database):
                assert time.monotonic() < deadline, "the scenario does not end"
                faults.on = True
                moved = orchestrator.tick()
                faults.on = False
                if not moved:
                    time.sleep(TICK_SECONDS)
        finally:
            faulty.close()
        return read_rows(database), world.record()


def run(
    databases: Databases, folder: Path, *, seeds: int = 40, first_seed: int = 1, rate: float = RATE
) -> Report:
    """Run the scenario once without faults, and once for every seed."""
    report = Report(f"{rate:.0%} of database calls fail, {databases.kind}")
    total = FaultCounts()
    began = time.monotonic()
    waits, retry.FIRST_WAIT_SECONDS = retry.FIRST_WAIT_SECONDS, FIRST_WAIT_SECONDS
    try:
        with databases.fresh() as url:
            expected, effects = run_scenario(
                url, folder / f"undisturbed-{time.monotonic_ns()}", Faults(0, rate=0.0)
            )
        different = doubled = 0
        for seed in range(first_seed, first_seed + seeds):
            faults = Faults(seed, rate)
            with databases.fresh() as url:
                rows, record = run_scenario(url, folder / f"seed-{seed}-{time.monotonic_ns()}", faults)
            lines = differences(expected, rows)
            report.problems += [f"seed {seed}: {line}" for line in lines]
            different += bool(lines)
            for effect in ("executed", "published", "swaps"):
                actual, wanted = sorted(getattr(record, effect)), sorted(getattr(effects, effect))
                if actual != wanted:
                    doubled += 1
                    report.problems.append(f"seed {seed}: {effect} {actual} instead of {wanted}")
            total.add(faults.counts)
    finally:
        retry.FIRST_WAIT_SECONDS = waits
    report.figures = {
        "seeds": seeds,
        "calls": total.calls,
        "failed before they executed": total.before,
        "executed but reported a failure": total.after,
        "of those, commits": total.after_commit,
        "runs with another outcome": different,
        "effects doubled or missing": doubled,
        "seconds": time.monotonic() - began,
    }
    report.require(total.before > 0 and total.after > 0, "no call failed")
    return report
