"""Attempts that end through no fault of the stage's: stopped, or lost after they had advanced."""

import pytest

from service.core.errors import Stopped, WorkerLost
from service.core.executor import Point, RunError
from service.core.plan import checkpoint_key
from service.core.retry import MAX_ATTEMPTS
from service.core.stage_specs import StageKind, TrainStage
from service.core.states import StageState, UpdateState

OFTEN = 2 * MAX_ATTEMPTS


@pytest.fixture
def update_id(house):
    update_id = house.add_update(house.add_model())
    house.executor.hold.add(StageKind.TRAIN_TRUNK)
    return update_id


def trunk_that_runs(house, orchestrator, update_id):
    """Tick until the trunk has been submitted; its row."""
    for _ in range(20):
        house.skip_waits()
        orchestrator.tick()
        stage = house.stages(update_id).get("trunk")
        if stage is not None and stage.run_id in house.executor.runs:
            return stage
    raise AssertionError(house.update(update_id).error)


def train(house, orchestrator, stage, steps):
    """Have the run report the steps, counted within the stage."""
    total = TrainStage.model_validate(stage.spec).total_steps
    points = [Point(stage.id, step, step, total, 3.0, 0.1, 1.0, 100.0, 0.0) for step in steps]
    house.executor.runs[stage.run_id]["points"].extend(points)
    orchestrator.tick()


def leave_checkpoint(house, stage, step):
    key = checkpoint_key(TrainStage.model_validate(stage.spec), step)
    with house.artifacts.writing(key) as directory:
        (directory / "content").write_text(key)
        house.artifacts.publish(key, directory, {})


def lose(house, orchestrator):
    house.executor.lose_everything()
    orchestrator.tick()


def test_an_attempt_that_left_a_checkpoint_is_not_counted_when_it_is_lost(house, update_id):
    for lost in range(OFTEN):
        orchestrator = house.orchestrator()  # every time another process
        house.expire_leases()
        stage = trunk_that_runs(house, orchestrator, update_id)
        assert stage.attempt == lost + 1
        assert stage.max_attempts == MAX_ATTEMPTS + lost
        train(house, orchestrator, stage, range(2 * lost + 1, 2 * lost + 3))
        leave_checkpoint(house, stage, 2 * lost + 2)
        lose(house, orchestrator)
    house.executor.hold.clear()
    assert house.finish(orchestrator, update_id).state == UpdateState.SUCCEEDED


def test_the_process_that_finds_it_lost_need_not_be_the_one_that_saw_it_advance(house, update_id):
    first, second = house.orchestrator(), house.orchestrator()
    stage = trunk_that_runs(house, first, update_id)
    train(house, first, stage, [1, 2, 3])
    leave_checkpoint(house, stage, 3)
    house.expire_leases()
    lose(house, second)
    stage = house.stages(update_id)["trunk"]
    assert (stage.state, stage.attempt, stage.max_attempts) == (StageState.READY, 1, MAX_ATTEMPTS + 1)


def test_attempts_that_get_no_further_are_counted(house, update_id):
    """They all come to the checkpoint that the first one left, and no further."""
    orchestrator = house.orchestrator()
    for lost in range(MAX_ATTEMPTS + 1):
        stage = trunk_that_runs(house, orchestrator, update_id)
        train(house, orchestrator, stage, [1, 2, 3] if lost == 0 else [3, 4])
        if lost == 0:
            leave_checkpoint(house, stage, 2)
        lose(house, orchestrator)
    update = house.update(update_id)
    assert update.state == UpdateState.FAILED
    assert update.error["code"] == WorkerLost.code
    assert house.stages(update_id)["trunk"].attempt == MAX_ATTEMPTS + 1


def test_a_stop_is_not_counted_and_the_next_attempt_may_begin_at_once(house, update_id):
    house.executor.hold.clear()
    stop = RunError("", Stopped.code, "asked to", retryable=True)
    house.executor.fail[StageKind.TRAIN_TRUNK] = [stop] * OFTEN
    orchestrator = house.orchestrator()
    for _ in range(60):
        orchestrator.tick()  # with no wait skipped
    assert house.update(update_id).state == UpdateState.SUCCEEDED
    assert house.stages(update_id)["trunk"].attempt == OFTEN + 1


def test_what_a_process_held_when_it_ended_is_taken_over_at_once(house, update_id):
    first, second = house.orchestrator(), house.orchestrator()
    stage = trunk_that_runs(house, first, update_id)
    second.tick()
    assert house.stages(update_id)["trunk"].owner == first.owner
    first.let_go()
    second.tick()
    taken = house.stages(update_id)["trunk"]
    assert (taken.owner, taken.attempt, taken.run_id) == (second.owner, 1, stage.run_id)
    house.executor.hold.clear()
    assert house.finish(second, update_id).state == UpdateState.SUCCEEDED


def test_what_ended_in_the_last_moment_is_written_down(house, update_id):
    orchestrator = house.orchestrator()
    trunk_that_runs(house, orchestrator, update_id)
    house.executor.hold.clear()
    orchestrator.let_go()
    assert house.stages(update_id)["trunk"].state == StageState.SUCCEEDED


def test_a_process_that_cannot_reach_the_database_any_more_ends_all_the_same(house, update_id, monkeypatch):
    from service.core.errors import DatabaseAway

    orchestrator = house.orchestrator()
    trunk_that_runs(house, orchestrator, update_id)

    def away():
        raise DatabaseAway

    monkeypatch.setattr(house.database, "transaction", away)
    orchestrator.let_go()
    monkeypatch.undo()
    assert house.stages(update_id)["trunk"].owner == orchestrator.owner
