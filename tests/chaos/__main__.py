"""``make chaos``: the fault campaign against orchestrators and databases. Exits with status 1 if it finds a problem.

python -m tests.chaos --minutes 240                                        # run for hours
python -m tests.chaos --only restarts --restart-minutes 10
python -m tests.chaos --only signals --database sqlite --seed 7
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.chaos import clocks, crash_points, faults, restarts, signals, suite
from tests.chaos.databases import Databases
from tests.chaos.report import Report, table
from tests.support.postgres import run_server

CHECKS = ("crash-points", "signals", "restarts", "clock", "faults", "suite")
KINDS = ("sqlite", "postgresql")
DEFAULT_MINUTES = 15.0
RESTART_SECONDS = 90.0
SIGNALS = 30  # stops in the default campaign, and as many kills; twice as many updates
MOVES = 6
SEEDS = 40


def reports(options: argparse.Namespace, folder: Path) -> Iterator[Report]:
    """Run the checks one by one. A campaign shorter than the default skips some crash points; longer ones run all."""
    scale = options.minutes / DEFAULT_MINUTES
    scaled = partial(_scaled, scale)
    for kind in KINDS if options.database == "both" else (options.database,):
        with ExitStack() as stack:
            server = stack.enter_context(run_server(_short(stack))) if kind == "postgresql" else None
            databases = Databases(kind, folder, server)
            if "crash-points" in options.only:
                yield crash_points.run(databases, folder, every=max(1, round(1 / scale)))
            if "signals" in options.only:
                count = scaled(SIGNALS)
                yield signals.run(
                    databases, folder, updates=2 * count, stops=count, kills=count, seed=options.seed
                )
            if "clock" in options.only:
                for host in ("one", "database"):
                    yield clocks.run(databases, folder, host=host, moves=scaled(MOVES), seed=options.seed)
            if "faults" in options.only:
                yield faults.run(databases, folder, seeds=scaled(SEEDS), first_seed=options.seed)
        if "suite" in options.only:
            # The orchestrator tests take one minute, the API tests three, and the stories with real training five.
            tests = suite.TESTS[: 1 if scale < 1 else 2 if scale < 2 else None]
            yield suite.run(kind, folder, tests=tests, seeds=scaled(1), first_seed=options.seed)
        if kind == "postgresql" and "restarts" in options.only:
            seconds = options.restart_minutes * 60 if options.restart_minutes else RESTART_SECONDS * scale
            with ExitStack() as stack:
                yield restarts.run(folder, _short(stack), seconds=seconds, seed=options.seed)


def _scaled(scale: float, count: int) -> int:
    return max(1, round(count * scale))


def _short(stack: ExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="The fault campaign.")
    parser.add_argument(
        "--minutes", type=float, default=DEFAULT_MINUTES, help="approximate duration for both databases"
    )
    parser.add_argument("--database", choices=("both", *KINDS), default="both")
    parser.add_argument("--only", choices=CHECKS, action="append", help="run only this check (repeatable)")
    parser.add_argument(
        "--restart-minutes", type=float, help="duration of the PostgreSQL restarts, independent of --minutes"
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    options.only = options.only or CHECKS
    logging.disable(logging.ERROR)  # the injected faults would log thousands of errors
    failed = False
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        for report in reports(options, Path(folder)):
            print(table([report]), flush=True)
            failed |= bool(report.problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
