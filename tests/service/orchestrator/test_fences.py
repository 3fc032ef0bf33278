"""An orchestrator that acts on outdated reads or claims has no effect on rows, runs or replicas."""

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.errors import DatabaseUnavailable
from service.core.executor import Point
from service.core.stage_specs import StageKind
from service.core.states import StageState, UpdateState
from service.orchestrator import release
from service.orchestrator.loop import Orchestrator
from service.store import stages
from service.store.database import now
from service.store.tables import Stage
from tests.service.orchestrator.conftest import Harness

PART_OF_A_TICK = pytest.mark.no_database_faults(
    "calls parts of a tick, and only whole ticks are repeated after a fault"
)


def run_until(harness: Harness, orchestrator: Orchestrator, kind: StageKind) -> None:
    """Tick until a stage of that kind runs, and hold it there."""
    harness.executor.hold = {kind}
    for _ in range(20):
        orchestrator.tick()
        with harness.database.reading() as session:
            if session.scalar(
                sa.select(Stage.id).where(Stage.kind == kind, Stage.state == StageState.RUNNING)
            ):
                return
    raise AssertionError(f"no {kind} runs")


def test_an_outdated_target_does_not_replace_a_newer_one(harness: Harness) -> None:
    model_id = harness.add_model(versions=2)
    one, two = harness.orchestrator(), harness.orchestrator()
    harness.finish(one, harness.add_update(model_id))
    old = [line.target for line in release.lines_of(harness.database)[0]]
    harness.finish(two, harness.add_update(model_id, 2))
    harness.serving.apply(old)
    assert harness.serving.swaps == [("m", 1), ("m", 2)]
    assert harness.serving.answers == {"m": 2}


def test_a_failed_release_raises_the_sequence_of_the_live_target(harness: Harness) -> None:
    harness.serving.broken = {2}
    model_id = harness.add_model(versions=2)
    orchestrator = harness.orchestrator()
    harness.finish(orchestrator, harness.add_update(model_id))
    harness.finish(orchestrator, harness.add_update(model_id, 2))
    orchestrator.tick()
    assert harness.serving.answers == {"m": 1}
    [line], _ = release.lines_of(harness.database)
    assert line.target.stable is not None
    # Three decisions: version 1 requested and promoted, version 2 requested, version 2 failed.
    assert (line.target.stable.number, line.target.sequence) == (1, 3)


@PART_OF_A_TICK
def test_a_run_is_not_submitted_after_its_lease_expired(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_id = harness.add_update(harness.add_model())
    orchestrator = harness.orchestrator()
    orchestrator.start()
    claim = stages.claim

    def stopped_after(session: Session, chain: Any, **values: Any) -> Any:
        claimed = claim(session, chain, **values)
        orchestrator.leases.lease_seconds = 0.0  # as if the lease had expired
        return claimed

    monkeypatch.setattr(stages, "claim", stopped_after)
    orchestrator.dispatch()
    monkeypatch.undo()
    assert harness.executor.submitted == []
    harness.expire_leases()
    assert harness.finish(harness.orchestrator(), update_id).state == UpdateState.SUCCEEDED
    assert harness.stages(update_id)["tokenizer"].attempt == 2


@PART_OF_A_TICK
def test_a_run_submitted_after_it_was_given_up_is_cancelled(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_id = harness.add_update(harness.add_model())
    slow, other = harness.orchestrator(), harness.orchestrator()
    slow.start()
    submit = harness.executor.submit

    def overtaken(run: Any) -> None:
        monkeypatch.undo()
        harness.expire_leases()
        other.tick()
        assert run.id in harness.executor.cancelled
        submit(run)

    monkeypatch.setattr(harness.executor, "submit", overtaken)
    slow.dispatch()
    assert list(harness.executor.runs) == [f"run-{harness.stages(update_id)['tokenizer'].id}-a1"]
    assert harness.finish(other, update_id).state == UpdateState.SUCCEEDED
    assert harness.stages(update_id)["tokenizer"].attempt == 2
    assert len(harness.executor.executed) == len(set(harness.executor.executed))


@PART_OF_A_TICK
def test_a_run_held_again_is_read_from_the_start(harness: Harness) -> None:
    harness.add_update(harness.add_model())
    first, second = harness.orchestrator(), harness.orchestrator()
    run_until(harness, first, StageKind.PACK)
    [held] = first.leases.stages.values()
    point = Point(1, 3.0, 0.1, 1.0, 100.0, held.stage_id, 1, 10, 9.0)
    harness.executor.runs[held.run_id]["points"].append(point)
    harness.expire_leases()
    second.tick()
    first.collect()
    assert not first.leases.stages
    assert not first.leases.cursors
    harness.expire_leases()
    with harness.database.transaction() as session:
        session.execute(sa.update(Stage).where(Stage.id == held.stage_id).values(progress=None))
    first.tick()
    with harness.database.reading() as session:
        assert stages.get(session, held.stage_id).progress["step"] == 1


@PART_OF_A_TICK
def test_a_failed_renewal_is_repeated_at_the_next_tick(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.add_update(harness.add_model())
    orchestrator = harness.orchestrator()
    run_until(harness, orchestrator, StageKind.PACK)
    orchestrator.leases.renewed_at -= orchestrator.lease_seconds

    def fail(session: Session, held: Any, lease_seconds: float) -> None:
        raise DatabaseUnavailable

    monkeypatch.setattr(stages, "renew", fail)
    with pytest.raises(DatabaseUnavailable):
        orchestrator.collect()
    monkeypatch.undo()
    assert orchestrator.leases.renewal_is_due()
    orchestrator.collect()
    assert not orchestrator.leases.renewal_is_due()


def test_a_clock_set_back_delays_nothing(harness: Harness) -> None:
    update_id = harness.add_update(harness.add_model())
    run_until(harness, harness.orchestrator(), StageKind.PACK)
    harness.executor.hold = set()
    hour = timedelta(hours=1)
    with harness.database.transaction() as session:
        at = now(session) + hour
        running = sa.update(Stage).where(Stage.state == StageState.RUNNING)
        session.execute(running.values(lease_until=at, started_at=at))
    second = harness.orchestrator()
    second.tick()
    with harness.database.transaction() as session:
        session.execute(sa.update(Stage).where(Stage.state == StageState.READY).values(ready_at=at))
    for _ in range(20):
        second.tick()
    assert harness.update(update_id).state == UpdateState.SUCCEEDED
    assert {stage.attempt for stage in harness.stages(update_id).values()} == {1}
