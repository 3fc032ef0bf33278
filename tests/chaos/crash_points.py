"""Kills the orchestrator or a worker at every crash point of a scenario and compares the outcomes.

An undisturbed run of the scenario records the points: before and after every commit, after every submission, after every
poll that reports the end of a stage (its artifact is published, but no row says so), after every swap, and before and
after a worker publishes. The scenario then runs again for every point. The process kills itself there, another one
continues, and the outcome must equal that of the undisturbed run.
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

from service.artifacts import LocalArtifacts
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
from tests.chaos.processes import FORK, forked
from tests.chaos.report import Report
from tests.chaos.rows import differences, read_rows
from tests.chaos.world import (
    FAILS_ONCE,
    GATED,
    OutsideExecutor,
    OutsideServing,
    Record,
    WorkerDeath,
    WorldManager,
    worlds,
)

LEASE_SECONDS = 0.3
SCENARIO_SECONDS = 60.0
TICK_SECONDS = 0.01
FIRST_WAIT_SECONDS = 0.05  # before a second attempt; short, so that cases are not spent waiting

# Lease renewals depend on the clock, so the last ones of one run may not happen in another.
MAX_MISSED = 0.1

CANCELLED = "cancelled"


CrashPoint = tuple[str, int]  # the description of a point, and how many times it must be reached


class PointRecorder:
    """Records the points that this process reaches, and kills it at ``crash_point``."""

    def __init__(self, crash_point: CrashPoint | None = None) -> None:
        self.reached: list[str] = []
        self._crash_point = crash_point

    def reach(self, point: str) -> None:
        self.reached.append(point)
        if (point, self.reached.count(point)) == self._crash_point:
            os.kill(os.getpid(), signal.SIGKILL)


class _Executor(OutsideExecutor):
    def __init__(self, world: Any, points: PointRecorder) -> None:
        super().__init__(world)
        self._points = points
        self._ended: set[str] = set()

    def submit(self, run: Run) -> None:
        super().submit(run)
        self._points.reach("after submit")

    def poll(self, run_id: str, cursor: int) -> RunReport:
        report = super().poll(run_id, cursor)
        if not report.finished <= self._ended:
            self._ended |= report.finished
            self._points.reach("after publish")
        return report


class _Serving(OutsideServing):
    def __init__(self, world: Any, points: PointRecorder) -> None:
        super().__init__(world)
        self._points = points

    def apply(self, targets: Sequence[ServedTarget]) -> None:
        if self._world.apply(targets):
            self._points.reach("after swap")


def _record_commits(database: Database, points: PointRecorder) -> None:
    dialect: Any = database.engine.dialect
    commit = dialect.do_commit

    def do_commit(connection: Any) -> None:
        transition = _transition()
        points.reach(f"before commit of {transition}")
        commit(connection)
        points.reach(f"after commit of {transition}")

    dialect.do_commit = do_commit


def _transition() -> str:
    """The functions of orchestrator and planning, innermost first, that make the current commit."""
    frame: Any = sys._getframe(1)
    names = []
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(("service.orchestrator.", "service.planning.")):
            names.append(frame.f_code.co_name.strip("_"))
        frame = frame.f_back
    return " < ".join(names[:2])


def _orchestrate(
    url: str, root: str, world: Any, owner: str, crash_point: CrashPoint | None, reached_file: Path | None
) -> None:
    """Run the orchestrator until every update has ended."""
    retry.FIRST_WAIT_SECONDS = FIRST_WAIT_SECONDS
    points = PointRecorder(crash_point)
    database = Database(url)
    _record_commits(database, points)
    orchestrator = Orchestrator(
        database,
        LocalArtifacts(Path(root)),
        _Executor(world, points),
        _Serving(world, points),
        owner,
        LEASE_SECONDS,
    )
    deadline = time.monotonic() + SCENARIO_SECONDS
    while unfinished(database) or _has_runs_to_end(database):
        assert time.monotonic() < deadline, "the scenario does not end"
        if not orchestrator.tick():
            time.sleep(TICK_SECONDS)
    if reached_file is not None:
        reached_file.write_text(json.dumps(points.reached))


def _has_runs_to_end(database: Database) -> bool:
    with database.reading() as session:
        return bool(stages.runs_to_end(session))


def _begin(url: str, root: str, world: Any) -> None:
    """Set up two updates of a line with one failed attempt, one that the gate rejects, and one cancelled while it ran.

    The first stages are held by an orchestrator that is gone.
    """
    database = Database(url)
    for name in (FAILS_ONCE, GATED, CANCELLED):
        add_line(database, name)
        push(database, name, 1)
    push(database, FAILS_ONCE, 2)
    world.hold_kinds({StageKind.TOKENIZER})
    gone = Orchestrator(
        database,
        LocalArtifacts(Path(root)),
        OutsideExecutor(world),
        OutsideServing(world),
        "gone",
        LEASE_SECONDS,
    )
    gone.tick()
    with database.reading() as session:
        model = models.model(session, CANCELLED)
        [update] = updates.of_model(session, model.id)
        assert any(row.state == StageState.RUNNING for row in updates.stages(session, update.id))
    cancel_update(database, update.id)
    world.hold_kinds(set())


@dataclass(frozen=True)
class Outcome:
    """The rows and effects of one run of the scenario, and the crash points that it reached."""

    rows: dict[str, list[str]]
    record: Record
    reached: list[str]
    killed: bool


def run_scenario(
    databases: Databases,
    manager: WorldManager,
    folder: Path,
    crash_point: CrashPoint | None = None,
    death: WorkerDeath | None = None,
) -> Outcome:
    """Run the scenario in a new database and a new world, with one kill or none."""
    root = folder / f"artifacts-{time.monotonic_ns()}"
    reached_file = root.with_suffix(".json")
    with databases.fresh() as url:
        world = manager.world(str(root), 0.0, death)
        arguments = (url, str(root), world)
        _join(forked(_begin, *arguments), 0)
        first = forked(_orchestrate, *arguments, "first", crash_point, reached_file)
        killed = _join(first, *([0] if crash_point is None else [-signal.SIGKILL, 0])) == -signal.SIGKILL
        if killed:
            _join(forked(_orchestrate, *arguments, "second", None, None), 0)
        with opened(url) as database:
            rows = read_rows(database)
        record: Record = world.record()
    reached = json.loads(reached_file.read_text()) if crash_point is None else []
    return Outcome(rows, record, reached, killed)


def _join(process: Any, *expected: int) -> int:
    process.join(2 * SCENARIO_SECONDS)
    code: int = process.exitcode
    assert code in expected, f"exit code {code} instead of {' or '.join(map(str, expected))}"
    return code


@dataclass(frozen=True)
class Case:
    """One kill: of the orchestrator at ``crash_point``, or of a worker."""

    name: str
    crash_point: CrashPoint | None = None
    death: WorkerDeath | None = None


def cases_of(undisturbed: Outcome) -> list[Case]:
    counts: Counter[str] = Counter()
    cases = []
    for point in undisturbed.reached:
        counts[point] += 1
        cases.append(Case(point, crash_point=(point, counts[point])))
    for number in range(1, len(undisturbed.record.executed) + 1):
        cases += [
            Case(f"worker, {when} publish", death=WorkerDeath(number, when)) for when in ("before", "after")
        ]
    return cases


def compare(undisturbed: Outcome, case: Case, outcome: Outcome) -> tuple[list[str], list[str]]:
    """Rows and effects that differ from the undisturbed run, and effects that happened more often than in it."""
    expected, actual = undisturbed.record, outcome.record
    doubled = [f"published {key}" for key in _surplus(actual.published, expected.published)]
    doubled += [f"swapped to {swap}" for swap in _surplus(actual.swaps, expected.swaps)]
    doubled += [f"submitted {run} twice" for run, count in Counter(actual.submitted).items() if count > 1]
    repeated = _surplus(actual.executed, expected.executed)
    # A worker killed before it publishes has to execute its stage again, once.
    allowed = 1 if case.death is not None and case.death.when == "before" else 0
    doubled += [f"executed {key} again" for key in repeated[allowed:]]
    missing = _surplus(expected.published, actual.published)
    missing += [str(swap) for swap in _surplus(expected.swaps, actual.swaps)]
    different = differences(undisturbed.rows, outcome.rows)
    return different + [f"missing effect {effect}" for effect in missing], doubled


def _surplus(actual: Sequence[Any], expected: Sequence[Any]) -> list[Any]:
    return list((Counter(actual) - Counter(expected)).elements())


def run(databases: Databases, folder: Path, every: int = 1, processes: int = 2) -> Report:
    """Run the scenario for every crash point, or every n-th, in parallel."""
    report = Report(f"kill -9 at every crash point, {databases.kind}")
    began = time.monotonic()
    with worlds() as manager:
        undisturbed = run_scenario(databases, manager, folder)
        again = run_scenario(databases, manager, folder)
    report.problems += [
        f"two undisturbed runs differ: {line}" for line in differences(undisturbed.rows, again.rows)
    ]
    cases = cases_of(undisturbed)[::every]
    results = FORK.Queue()
    workers = [
        FORK.Process(
            target=_run_cases, args=(databases, folder, undisturbed, cases[number::processes], results)
        )
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    outcomes = [results.get() for _ in cases]
    for worker in workers:
        worker.join()
    different = [f"{name}: {line}" for name, lines, _, _ in outcomes for line in lines]
    doubled = [f"{name}: {line}" for name, _, lines, _ in outcomes for line in lines]
    missed = sum(not killed for _, _, _, killed in outcomes)
    report.problems += different + doubled
    report.require(missed <= MAX_MISSED * len(cases), f"{missed} points were not reached again")
    report.figures = {
        "transitions of the undisturbed run": len({p for p in undisturbed.reached if "commit" in p}) // 2,
        "commits": sum(point.startswith("before") for point in undisturbed.reached),
        "crash points of orchestrator and workers": len(cases_of(undisturbed)),
        "cases, each with one SIGKILL": len(cases) - missed,
        "points that were not reached again": missed,
        "cases with another outcome": len({name for name, lines, _, _ in outcomes if lines}),
        "effects doubled": len(doubled),
        "seconds": time.monotonic() - began,
    }
    return report


def _run_cases(
    databases: Databases, folder: Path, undisturbed: Outcome, cases: Sequence[Case], results: Any
) -> None:
    with worlds() as manager:
        for number, case in enumerate(cases, start=1):
            name = f"{case.name} (case {number})"
            try:
                outcome = run_scenario(databases, manager, folder, case.crash_point, case.death)
                different, doubled = compare(undisturbed, case, outcome)
                killed = outcome.killed or outcome.record.workers_killed > 0
            except Exception as error:
                different, doubled, killed = [f"{type(error).__name__}: {error}"], [], True
            results.put((name, different, doubled, killed))
