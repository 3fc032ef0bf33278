"""Kill -9 at every point of a story at which something has just been done, or is just not done yet.

The points are found by telling the story once undisturbed: around every commit, after every submission, after every
poll that brought a stage's end (its artifact is published, no row says so), after every swap, and of the worker before and
after it publishes. Then it is told again for every point, with a process that kills itself there and another one that
goes on, and what it comes to is compared.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.artifacts import Artifacts
from service.core import retry
from service.core.executor import Run, RunReport
from service.core.serving import ServedTarget
from service.core.stage_specs import StageKind
from service.core.states import StageState
from service.operations.updates import cancel_update
from service.orchestrator.loop import Orchestrator
from service.store import models, stages, updates
from service.store.database import Database
from tests.chaos.databases import Databases, add_line, opened, push, unfinished
from tests.chaos.outcome import differences, outcome
from tests.chaos.processes import FORK, forked
from tests.chaos.report import Report
from tests.chaos.world import FAILS_ONCE, GATED, OutsideExecutor, OutsideServing, Record, WorkerDeath, worlds

LEASE_SECONDS = 0.3
STORY_SECONDS = 60.0
TICK_SECONDS = 0.01
FIRST_WAIT_SECONDS = 0.05  # what a second attempt waits for, so that no case is spent waiting

# Leases are renewed by the clock, so the last renewals of one telling need not come in another.
MOST_MISSED = 0.1

CANCELLED = "cancelled"


Last = tuple[str, int]


class Points:
    """Notes the points that are passed, and kills this process at ``last``: what it is, and the how manieth of its kind."""

    def __init__(self, last: Last | None = None) -> None:
        self.passed: list[str] = []
        self._last = last

    def reached(self, what: str) -> None:
        self.passed.append(what)
        if (what, self.passed.count(what)) == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


class _Executor(OutsideExecutor):
    def __init__(self, world: Any, points: Points) -> None:
        super().__init__(world)
        self._points = points
        self._ended: set[str] = set()

    def submit(self, run: Run) -> None:
        super().submit(run)
        self._points.reached("after submit")

    def poll(self, run_id: str, cursor: int) -> RunReport:
        report = super().poll(run_id, cursor)
        if not report.finished <= self._ended:
            self._ended |= report.finished
            self._points.reached("after publish")
        return report


class _Serving(OutsideServing):
    def __init__(self, world: Any, points: Points) -> None:
        super().__init__(world)
        self._points = points

    def apply(self, targets: Sequence[ServedTarget]) -> None:
        if self._world.apply(targets):
            self._points.reached("after swap")


def _watch_commits(database: Database, points: Points) -> None:
    dialect: Any = database.engine.dialect
    commit = dialect.do_commit

    def watched(connection: Any) -> None:
        transition = _transition()
        points.reached(f"before commit of {transition}")
        commit(connection)
        points.reached(f"after commit of {transition}")

    dialect.do_commit = watched


def _transition() -> str:
    """Which functions of the orchestrator the present commit belongs to."""
    frame: Any = sys._getframe(1)
    names = []
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("service.orchestrator."):
            names.append(frame.f_code.co_name.strip("_"))
        frame = frame.f_back
    return " < ".join(names[:2])


def _tell(url: str, root: str, world: Any, owner: str, last: Last | None, passed: Path | None) -> None:
    """Be the orchestrator until every update has ended."""
    retry.FIRST_WAIT_SECONDS = FIRST_WAIT_SECONDS
    points = Points(last)
    database = Database(url)
    _watch_commits(database, points)
    orchestrator = Orchestrator(
        database,
        Artifacts(Path(root)),
        _Executor(world, points),
        _Serving(world, points),
        owner,
        LEASE_SECONDS,
    )
    deadline = time.monotonic() + STORY_SECONDS
    while unfinished(database) or _has_runs_to_end(database):
        assert time.monotonic() < deadline, "the story does not come to its end"
        if not orchestrator.tick():
            time.sleep(TICK_SECONDS)
    if passed is not None:
        passed.write_text(json.dumps(points.passed))


def _has_runs_to_end(database: Database) -> bool:
    with database.reading() as session:
        return bool(stages.runs_to_end(session))


def _begin(url: str, root: str, world: Any) -> None:
    """Two updates of a line, of which one attempt fails; one that the gate refuses; one that was cancelled while it ran.

    What runs at first is held by somebody who is gone.
    """
    database = Database(url)
    for name in (FAILS_ONCE, GATED, CANCELLED):
        add_line(database, name)
        push(database, name, 1)
    push(database, FAILS_ONCE, 2)
    world.hold_kinds({StageKind.TOKENIZER})
    gone = Orchestrator(
        database, Artifacts(Path(root)), OutsideExecutor(world), OutsideServing(world), "gone", LEASE_SECONDS
    )
    gone.tick()
    with database.reading() as session:
        model = models.model(session, CANCELLED)
        [update] = updates.of_model(session, model.id)
        assert any(row.state == StageState.RUNNING for row in updates.stages(session, update.id))
    cancel_update(database, update.id)
    world.hold_kinds(set())


@dataclass(frozen=True)
class Telling:
    """What a story came to in the rows and in the world, and at which points it could have been cut short."""

    rows: dict[str, list[str]]
    record: Record
    passed: list[str]
    killed: bool


def tell(
    databases: Databases,
    manager: Any,
    folder: Path,
    last: Last | None = None,
    death: WorkerDeath | None = None,
) -> Telling:
    """Tell the story in a fresh database and a fresh world, killed at one point or not at all."""
    root = folder / f"artifacts-{time.monotonic_ns()}"
    passed = root.with_suffix(".json")
    with databases.fresh() as url:
        world = manager.world(str(root), 0.0, death)
        arguments = (url, str(root), world)
        _join(forked(_begin, *arguments), 0)
        first = forked(_tell, *arguments, "first", last, passed)
        killed = _join(first, *([0] if last is None else [-signal.SIGKILL, 0])) == -signal.SIGKILL
        if killed:
            _join(forked(_tell, *arguments, "second", None, None), 0)
        with opened(url) as database:
            rows = outcome(database)
        record: Record = world.record()
    return Telling(rows, record, json.loads(passed.read_text()) if last is None else [], killed)


def _join(process: Any, *expected: int) -> int:
    process.join(2 * STORY_SECONDS)
    code: int = process.exitcode
    assert code in expected, f"ended with {code}, not with {' or '.join(map(str, expected))}"
    return code


@dataclass(frozen=True)
class Case:
    """One death: of the orchestrator at point ``last``, or of a worker."""

    name: str
    last: Last | None = None
    death: WorkerDeath | None = None


def cases_of(undisturbed: Telling) -> list[Case]:
    seen: Counter[str] = Counter()
    found = []
    for what in undisturbed.passed:
        seen[what] += 1
        found.append(Case(what, last=(what, seen[what])))
    for number in range(1, len(undisturbed.record.executed) + 1):
        found += [
            Case(f"worker, {when} publish", death=WorkerDeath(number, when)) for when in ("before", "after")
        ]
    return found


def compare(undisturbed: Telling, case: Case, got: Telling) -> tuple[list[str], list[str]]:
    """Differences of the rows, and effects that there were more of than in the undisturbed story."""
    expected, seen = undisturbed.record, got.record
    doubled = [f"published {key}" for key in _more(seen.published, expected.published)]
    doubled += [f"swapped to {swap}" for swap in _more(seen.swaps, expected.swaps)]
    doubled += [f"submitted {run} twice" for run, count in Counter(seen.submitted).items() if count > 1]
    again = _more(seen.executed, expected.executed)
    # What a worker had not published before it was killed has to be made again, once.
    allowed = 1 if case.death is not None and case.death.when == "before" else 0
    doubled += [f"executed {key} again" for key in again[allowed:]]
    found = differences(undisturbed.rows, got.rows)
    missing = _more(expected.published, seen.published) + [str(s) for s in _more(expected.swaps, seen.swaps)]
    return found + [f"missing effect {effect}" for effect in missing], doubled


def _more(seen: Sequence[Any], expected: Sequence[Any]) -> list[Any]:
    return list((Counter(seen) - Counter(expected)).elements())


def run(databases: Databases, folder: Path, every: int = 1, processes: int = 2) -> Report:
    """Tell the story for every point (or every n-th), several side by side."""
    report = Report(f"kill -9 at every point, {databases.kind}")
    began = time.monotonic()
    with worlds() as manager:
        undisturbed = tell(databases, manager, folder)
        once_more = tell(databases, manager, folder)
    report.problems += [
        f"undisturbed twice: {line}" for line in differences(undisturbed.rows, once_more.rows)
    ]
    cases = cases_of(undisturbed)[::every]
    results = FORK.Queue()
    workers = [
        FORK.Process(target=_share, args=(databases, folder, undisturbed, cases[number::processes], results))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    outcomes = [results.get() for _ in cases]
    for worker in workers:
        worker.join()
    different = [f"{name}: {line}" for name, found, _, _ in outcomes for line in found]
    doubled = [f"{name}: {line}" for name, _, found, _ in outcomes for line in found]
    missed = sum(not killed for _, _, _, killed in outcomes)
    report.problems += different + doubled
    report.require(missed <= MOST_MISSED * len(cases), f"{missed} points did not come again")
    report.figures = {
        "transitions of the undisturbed story": len({p for p in undisturbed.passed if "commit" in p}) // 2,
        "commits": sum(point.startswith("before") for point in undisturbed.passed),
        "points of orchestrator and workers": len(cases_of(undisturbed)),
        "cases, each a SIGKILL": len(cases) - missed,
        "points that did not come again": missed,
        "cases that ended otherwise": len({name for name, found, _, _ in outcomes if found}),
        "effects doubled": len(doubled),
        "seconds": time.monotonic() - began,
    }
    return report


def _share(
    databases: Databases, folder: Path, undisturbed: Telling, cases: Sequence[Case], results: Any
) -> None:
    with worlds() as manager:
        for number, case in enumerate(cases, start=1):
            name = f"{case.name} (case {number})"
            try:
                got = tell(databases, manager, folder, case.last, case.death)
                found, doubled = compare(undisturbed, case, got)
                killed = got.killed or got.record.workers_killed > 0
            except Exception as error:
                found, doubled, killed = [f"{type(error).__name__}: {error}"], [], True
            results.put((name, found, doubled, killed))
