"""A database that fails at random calls: before it has done what was asked, or after, and only says that it has failed."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import event

from service.core import retry
from service.orchestrator.loop import Orchestrator
from service.store.database import Database
from tests.chaos.databases import Databases, add_line, opened, push, unfinished
from tests.chaos.outcome import differences, outcome
from tests.chaos.report import Report
from tests.chaos.world import FAILS_ONCE, GATED, OutsideExecutor, OutsideServing, Record, World

RATE = 0.01
LEASE_SECONDS = 0.2
STORY_SECONDS = 60.0
TICK_SECONDS = 0.005
FIRST_WAIT_SECONDS = 0.02


@dataclass
class Faults:
    """Fails ``rate`` of statements and of commits: half of those before they are done, half of those after."""

    seed: int
    rate: float = RATE
    on: bool = False
    calls: int = 0
    before: int = 0
    after: int = 0
    after_commit: int = 0
    _chance: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)

    def inject(self, database: Database) -> None:
        """Into a database from whose engine nothing has connected yet."""
        dialect: Any = database.engine.dialect
        failure = dialect.loaded_dbapi.OperationalError
        commit = dialect.do_commit

        def do_commit(connection: Any) -> None:
            self._call(lambda: commit(connection), failure, is_commit=True)

        dialect.do_commit = do_commit

        def do_execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
            self._call(lambda: cursor.execute(statement, parameters), failure)
            return True  # it is done: the dialect need not

        event.listen(database.engine, "do_execute", do_execute)

    def _call(self, act: Callable[[], object], failure: type[Exception], *, is_commit: bool = False) -> None:
        fails = self.on and self._chance.random() < self.rate
        self.calls += self.on
        if fails and self._chance.random() < 0.5:
            self.before += 1
            raise failure("chaos: it was not done")
        act()
        if fails:
            self.after += 1
            self.after_commit += is_commit
            raise failure("chaos: it was done, and its answer is lost")


def tell(url: str, root: Path, faults: Faults) -> tuple[dict[str, list[str]], Record]:
    """Two updates of a line, of which one attempt fails, and one that the gate refuses: by one orchestrator."""
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
        deadline = time.monotonic() + STORY_SECONDS
        try:
            while unfinished(database):
                assert time.monotonic() < deadline, "the story does not come to its end"
                faults.on = True
                moved = orchestrator.tick()
                faults.on = False
                if not moved:
                    time.sleep(TICK_SECONDS)
        finally:
            faulty.close()
        return outcome(database), world.record()


def run(
    databases: Databases, folder: Path, *, seeds: int = 40, first_seed: int = 1, rate: float = RATE
) -> Report:
    """Tell the story once without faults, and once for every seed."""
    report = Report(f"{rate:.0%} of database calls fail, {databases.kind}")
    total = Faults(0)
    began = time.monotonic()
    waits, retry.FIRST_WAIT_SECONDS = retry.FIRST_WAIT_SECONDS, FIRST_WAIT_SECONDS
    try:
        with databases.fresh() as url:
            expected, effects = tell(url, folder / f"undisturbed-{time.monotonic_ns()}", Faults(0, rate=0.0))
        different = doubled = 0
        for seed in range(first_seed, first_seed + seeds):
            faults = Faults(seed, rate)
            with databases.fresh() as url:
                rows, record = tell(url, folder / f"seed-{seed}-{time.monotonic_ns()}", faults)
            found = differences(expected, rows)
            report.problems += [f"seed {seed}: {line}" for line in found]
            different += bool(found)
            for what in ("executed", "published", "swaps"):
                seen, wanted = sorted(getattr(record, what)), sorted(getattr(effects, what))
                if seen != wanted:
                    doubled += 1
                    report.problems.append(f"seed {seed}: {what} {seen} instead of {wanted}")
            for name in ("calls", "before", "after", "after_commit"):
                setattr(total, name, getattr(total, name) + getattr(faults, name))
    finally:
        retry.FIRST_WAIT_SECONDS = waits
    report.figures = {
        "seeds": seeds,
        "calls": total.calls,
        "failed before they were done": total.before,
        "done but reported failed": total.after,
        "of those commits": total.after_commit,
        "stories that ended otherwise": different,
        "effects doubled or missing": doubled,
        "seconds": time.monotonic() - began,
    }
    report.require(total.before > 0 and total.after > 0, "no call failed")
    return report
