"""What one orchestrator has read or claimed too long ago does nothing outside of the rows either."""

from datetime import timedelta

import pytest
import sqlalchemy as sa

from service.core.errors import DatabaseAway
from service.core.executor import Point
from service.core.stage_specs import StageKind
from service.core.states import StageState, UpdateState
from service.orchestrator import collect, dispatch, release
from service.store import stages
from service.store.database import now
from service.store.tables import Stage

PART_OF_A_TICK = pytest.mark.no_database_faults("calls a part of a tick, and only whole ticks come again")


def run_until(house, orchestrator, kind):
    """Tick until a stage of that kind runs, and stays at it."""
    house.executor.hold = {kind}
    for _ in range(20):
        orchestrator.tick()
        with house.database.reading() as session:
            if session.scalar(
                sa.select(Stage.id).where(Stage.kind == kind, Stage.state == StageState.RUNNING)
            ):
                return
    raise AssertionError(f"no {kind} runs")


def test_whoever_read_first_and_speaks_last_does_not_take_back_what_is_served(house):
    model_id = house.add_model(versions=2)
    one, two = house.orchestrator(), house.orchestrator()
    house.finish(one, house.add_update(model_id))
    old = [line.target for line in release.lines_of(house.database)[0]]
    house.finish(two, house.add_update(model_id, 2))
    house.serving.apply(old)
    assert house.serving.swaps == [("m", 1), ("m", 2)]
    assert house.serving.answers == {"m": 2}


def test_after_a_release_that_failed_what_was_live_is_a_later_decision(house):
    house.serving.broken = {2}
    model_id = house.add_model(versions=2)
    orchestrator = house.orchestrator()
    house.finish(orchestrator, house.add_update(model_id))
    house.finish(orchestrator, house.add_update(model_id, 2))
    orchestrator.tick()
    assert house.serving.answers == {"m": 1}
    [line], _ = release.lines_of(house.database)
    assert line.target.stable is not None
    # Asked for and promoted; asked for; failed.
    assert (line.target.stable.number, line.target.sequence) == (1, 3)


@PART_OF_A_TICK
def test_a_claim_that_ran_out_before_it_was_submitted_is_not_submitted(house, monkeypatch):
    update_id = house.add_update(house.add_model())
    orchestrator = house.orchestrator()
    orchestrator._start()
    claim = stages.claim

    def stopped_after(session, chain, **values):
        claimed = claim(session, chain, **values)
        orchestrator.holding.lease_seconds = 0.0  # as if that long had passed
        return claimed

    monkeypatch.setattr(dispatch.stages, "claim", stopped_after)
    orchestrator._dispatch()
    monkeypatch.undo()
    assert house.executor.submitted == []
    house.expire_leases()
    assert house.finish(house.orchestrator(), update_id).state == UpdateState.SUCCEEDED
    assert house.stages(update_id)["tokenizer"].attempt == 2


@PART_OF_A_TICK
def test_a_run_that_is_submitted_after_it_was_given_up_is_cancelled(house, monkeypatch):
    update_id = house.add_update(house.add_model())
    slow, other = house.orchestrator(), house.orchestrator()
    slow._start()
    submit = house.executor.submit

    def overtaken(run):
        monkeypatch.undo()
        house.expire_leases()
        other.tick()
        assert run.id in house.executor.cancelled
        submit(run)

    monkeypatch.setattr(house.executor, "submit", overtaken)
    slow._dispatch()
    assert list(house.executor.runs) == [f"run-{house.stages(update_id)['tokenizer'].id}-a1"]
    assert house.finish(other, update_id).state == UpdateState.SUCCEEDED
    assert house.stages(update_id)["tokenizer"].attempt == 2
    assert len(house.executor.executed) == len(set(house.executor.executed))


@PART_OF_A_TICK
def test_a_run_that_is_lost_to_another_is_read_from_its_beginning_when_it_is_held_again(house):
    house.add_update(house.add_model())
    first, second = house.orchestrator(), house.orchestrator()
    run_until(house, first, StageKind.PACK)
    [held] = first.holding.stages.values()
    point = Point(held.stage_id, 1, 1, 10, 3.0, 0.1, 1.0, 100.0, 9.0)
    house.executor.runs[held.run_id]["points"].append(point)
    house.expire_leases()
    second.tick()
    first._collect()
    assert not first.holding.stages
    assert not first.holding.cursors
    house.expire_leases()
    with house.database.transaction() as session:
        session.execute(sa.update(Stage).where(Stage.id == held.stage_id).values(progress=None))
    first.tick()
    with house.database.reading() as session:
        assert stages.get(session, held.stage_id).progress["step"] == 1


@PART_OF_A_TICK
def test_a_renewal_that_failed_is_tried_at_the_next_tick(house, monkeypatch):
    house.add_update(house.add_model())
    orchestrator = house.orchestrator()
    run_until(house, orchestrator, StageKind.PACK)
    orchestrator.holding._renewed -= orchestrator.lease_seconds

    def away(session, held, lease_seconds):
        raise DatabaseAway

    monkeypatch.setattr(collect.stages, "renew", away)
    with pytest.raises(DatabaseAway):
        orchestrator._collect()
    monkeypatch.undo()
    assert orchestrator.holding.renewal_is_due()
    orchestrator._collect()
    assert not orchestrator.holding.renewal_is_due()


def test_a_clock_that_was_set_back_holds_nothing_up(house):
    update_id = house.add_update(house.add_model())
    run_until(house, house.orchestrator(), StageKind.PACK)
    house.executor.hold = set()
    hour = timedelta(hours=1)
    with house.database.transaction() as session:
        at = now(session) + hour
        running = sa.update(Stage).where(Stage.state == StageState.RUNNING)
        session.execute(running.values(lease_until=at, started_at=at))
    second = house.orchestrator()
    second.tick()
    with house.database.transaction() as session:
        session.execute(sa.update(Stage).where(Stage.state == StageState.READY).values(ready_at=at))
    for _ in range(20):
        second.tick()
    assert house.update(update_id).state == UpdateState.SUCCEEDED
    assert {stage.attempt for stage in house.stages(update_id).values()} == {1}
