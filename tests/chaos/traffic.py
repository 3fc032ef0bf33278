"""Orchestrators work on lines with new data while a campaign disturbs them; the audit judges the result."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.artifacts import LocalArtifacts
from service.core import retry
from service.main import tick_until
from service.orchestrator.loop import Orchestrator
from service.store.database import Database
from tests.chaos import audit
from tests.chaos.audit import Findings
from tests.chaos.databases import add_line, holders, opened, push, unfinished, with_retries
from tests.chaos.processes import Fleet, stopping_at_sigterm
from tests.chaos.report import Report
from tests.chaos.world import OutsideExecutor, OutsideServing, Record

TICK_SECONDS = 0.1
STAGE_SECONDS = 0.4
POLL_SECONDS = 0.25
LAST_UPDATES_SECONDS = 300.0
FIRST_WAIT_SECONDS = 0.2
CAMPAIGN = "campaign"


@dataclass(frozen=True)
class Traffic:
    """The load: each of ``lines`` models gets ``versions`` data versions, one every ``seconds_between``."""

    lines: int
    versions: int
    orchestrators: int
    lease_seconds: float
    seconds_between: float = 0.0


@dataclass
class Result:
    """The result of a campaign."""

    findings: Findings
    record: Record
    updates: int
    transitions: int
    takeovers: int
    fleet: Fleet


def run(
    url: str,
    root: Path,
    world: Any,
    traffic: Traffic,
    disturb: Callable[[Fleet, random.Random, Sequence[str]], None],
    enough: Callable[[Fleet], bool],
    seed: int,
    prepare: Callable[[str, Database], None] = lambda owner, database: None,
) -> Result:
    """Run orchestrators and disturb them at every poll, until ``enough`` holds and all updates have ended.

    While ``enough`` does not hold, every line gets another data version when all updates have ended.
    """
    rng = random.Random(seed)
    names = [f"line{number}" for number in range(traffic.lines)]
    with opened(url) as database:
        audit.install(database)
        audit.sign(database, CAMPAIGN)
        for name in names:
            add_line(database, name)
    pushed, next_push = 0, 0.0

    def orchestrate(owner: str) -> None:
        retry.FIRST_WAIT_SECONDS = FIRST_WAIT_SECONDS
        stopping = stopping_at_sigterm()
        database = audit.sign(Database(url), owner)
        prepare(owner, database)
        tick_until(
            stopping,
            Orchestrator(
                database,
                LocalArtifacts(root),
                OutsideExecutor(world),
                OutsideServing(world),
                owner,
                traffic.lease_seconds,
            ),
            TICK_SECONDS,
        )

    fleet = Fleet(orchestrate, traffic.orchestrators)
    deadline = float("inf")
    try:
        while True:
            due = time.monotonic() >= next_push
            if pushed < traffic.versions and due:
                pushed, next_push = pushed + 1, time.monotonic() + traffic.seconds_between
                for name in names:
                    _push(url, name, pushed)
            num_unfinished, owners = _status(url)
            done = pushed >= traffic.versions and num_unfinished == 0
            if enough(fleet):
                if done:
                    break
                if pushed >= traffic.versions and deadline == float("inf"):
                    deadline = time.monotonic() + LAST_UPDATES_SECONDS
                if time.monotonic() > deadline:
                    break  # the audit lists what did not end
            elif done:
                pushed += 1
                for name in names:
                    _push(url, name, pushed)
            if not enough(fleet):
                disturb(fleet, rng, owners)
            fleet.check()
            time.sleep(POLL_SECONDS)
    finally:
        fleet.end()
    record: Record = world.record()
    with opened(url) as database:
        audit.sign(database, CAMPAIGN)
        return Result(
            findings=audit.judge(database, record),
            record=record,
            updates=pushed * len(names),
            transitions=audit.transitions(database),
            takeovers=audit.takeovers(database),
            fleet=fleet,
        )


def report_of(title: str, result: Result, seconds: float) -> Report:
    """The figures that these campaigns have in common, and the problems found."""
    findings, record = result.findings, result.record
    executed = len(record.executed) - len(set(record.executed))
    report = Report(
        title,
        {
            "updates": result.updates,
            "transitions": result.transitions,
            "submissions": len(record.submitted),
            "artifacts published": len(record.published),
            "takeovers": result.takeovers,
            "stale writes accepted": len(findings.stale),
            "illegal moves": len(findings.illegal),
            "lost": len(findings.lost),
            "doubled": len(findings.doubled),
            "stages that ran again after a lost run": executed,
            "orchestrators that crashed": len(result.fleet.crashed),
            "seconds": seconds,
        },
    )
    report.problems = findings.all() + result.fleet.crashed
    return report


def _push(url: str, name: str, number: int) -> None:
    def act() -> None:
        with opened(url) as database:
            push(audit.sign(database, CAMPAIGN), name, number)

    with_retries(act)


def _status(url: str) -> tuple[int, Sequence[str]]:
    """The number of unfinished updates, and the owners of running stages."""

    def act() -> tuple[int, Sequence[str]]:
        with opened(url) as database:
            return unfinished(database), holders(database)

    return with_retries(act)
