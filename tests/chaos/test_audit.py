"""The audit finds what goes wrong without a guard, and finds nothing while all guards are in place."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.stage_specs import StageKind
from service.core.states import StageState
from service.orchestrator.loop import Orchestrator
from service.store import stages
from service.store.database import Database, now
from service.store.tables import ModelVersion, Stage
from tests.chaos import audit
from tests.chaos.audit import Findings
from tests.chaos.databases import add_line, push, unfinished
from tests.chaos.world import OutsideExecutor, OutsideServing, World

LEASE_SECONDS = 30.0
TICKS = 60


@dataclass
class Audited:
    """An audited database with a line of one update, and orchestrators that sign their writes."""

    campaign: Database
    world: World
    opened: list[Database]

    def orchestrator(self, owner: str) -> Orchestrator:
        database = audit.sign(Database(self.campaign.url), owner)
        self.opened.append(database)
        return Orchestrator(
            database,
            self.world.artifacts,
            OutsideExecutor(self.world),
            OutsideServing(self.world),
            owner,
            LEASE_SECONDS,
        )

    def finish(self, *orchestrators: Orchestrator) -> None:
        for _ in range(TICKS):
            for orchestrator in orchestrators:
                orchestrator.tick()
            if not unfinished(self.campaign):
                return
        raise AssertionError("the updates did not end")

    def expire_leases(self) -> None:
        with self.campaign.transaction() as session:
            past = now(session).replace(year=2000)
            session.execute(
                sa.update(Stage).where(Stage.state == StageState.RUNNING).values(lease_until=past)
            )

    def findings(self) -> Findings:
        return audit.judge(self.campaign, self.world.record())


@pytest.fixture
def audited(database: Database, tmp_path: Path) -> Iterator[Audited]:
    audit.install(database)
    campaign = audit.sign(Database(database.url), "campaign")
    audited = Audited(campaign, World(str(tmp_path / "artifacts")), [campaign])
    add_line(campaign, "line")
    push(campaign, "line", 1)
    yield audited
    for opened in audited.opened:
        opened.close()


def _orchestrators_after_a_takeover(audited: Audited) -> tuple[Orchestrator, Orchestrator]:
    """An orchestrator that believes it holds a training stage, and one that has taken the stage over."""
    audited.world.hold_kinds({StageKind.TRAIN_TRUNK})
    first, second = audited.orchestrator("first"), audited.orchestrator("second")
    for _ in range(10):
        first.tick()
    audited.expire_leases()
    second.tick()
    audited.world.hold_kinds(set())
    return first, second


def test_the_audit_finds_nothing_while_every_guard_is_in_place(audited: Audited) -> None:
    first, second = _orchestrators_after_a_takeover(audited)
    first.collect()
    audited.finish(second, first)
    findings = audited.findings()
    # The test itself expired the leases, without holding them.
    assert all("campaign wrote" in finding for finding in findings.all())


def test_a_write_under_an_old_epoch_is_found(audited: Audited, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _orchestrators_after_a_takeover(audited)

    def unguarded(session: Session, stage_id: str, epoch: int, **values: Any) -> None:
        session.execute(
            sa.update(Stage)
            .where(Stage.id == stage_id, Stage.state == StageState.RUNNING)
            .values(**values)
            .execution_options(synchronize_session=False)
        )

    monkeypatch.setattr(stages, "guarded_update", unguarded)
    first.collect()
    monkeypatch.undo()
    audited.finish(second)
    assert any(
        "first wrote running -> succeeded while second held epoch 2" in s for s in audited.findings().stale
    )


def test_a_takeover_without_a_new_epoch_is_found(audited: Audited) -> None:
    first, _ = _orchestrators_after_a_takeover(audited)
    with first.database.transaction() as session:
        session.execute(sa.update(Stage).where(Stage.state == StageState.RUNNING).values(owner="first"))
    findings = audited.findings()
    assert any("taken over without a new epoch" in found for found in findings.illegal)
    assert any("first wrote running -> running" in found for found in findings.stale)


def test_a_lost_version_is_found(audited: Audited) -> None:
    audited.finish(audited.orchestrator("one"))
    push(audited.campaign, "line", 2)
    lost = audited.findings().lost
    assert "line: data version 2" in lost
    assert any("is pending" in found for found in lost)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda world: world.record().swaps.append(("line", 1)), "swapped to ('line', 1) 2 times"),
        (lambda world: world.record().published.append(world.record().published[0]), "2 times"),
    ],
)
def test_a_doubled_effect_is_found(audited: Audited, damage: Callable[[World], None], found: str) -> None:
    audited.finish(audited.orchestrator("one"))
    assert audited.findings().doubled == []
    damage(audited.world)
    [doubled] = audited.findings().doubled
    assert found in doubled


def test_a_wrongly_numbered_version_is_found(audited: Audited) -> None:
    audited.finish(audited.orchestrator("one"))
    with audited.campaign.transaction() as session:
        session.execute(sa.update(ModelVersion).values(number=3))
    assert audited.findings().doubled == ["line: model versions are numbered [3]"]
