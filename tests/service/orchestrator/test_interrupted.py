"""Attempts that end through no fault of the stage: stopped, or lost after they had advanced."""

from typing import Any

import pytest

from service.core.errors import Stopped, WorkerLost
from service.core.executor import Point, RunError
from service.core.plan import checkpoint_key
from service.core.retry import MAX_ATTEMPTS
from service.core.stage_specs import StageKind, TrainStage
from service.core.states import StageState, UpdateState
from service.orchestrator.loop import Orchestrator
from service.store.tables import Stage
from tests.service.orchestrator.conftest import Harness

OFTEN = 2 * MAX_ATTEMPTS


@pytest.fixture
def update_id(harness: Harness) -> str:
    update_id = harness.add_update(harness.add_model())
    harness.executor.hold.add(StageKind.TRAIN_TRUNK)
    return update_id


def trunk_that_runs(harness: Harness, orchestrator: Orchestrator, update_id: str) -> Any:
    """Tick until the trunk has been submitted, and return its row."""
    for _ in range(20):
        harness.skip_waits()
        orchestrator.tick()
        stage = harness.stages(update_id).get("trunk")
        if stage is not None and stage.run_id in harness.executor.runs:
            return stage
    raise AssertionError(harness.update(update_id).error)


def train(harness: Harness, orchestrator: Orchestrator, stage: Stage, steps: Any) -> None:
    """Have the run report these steps, counted within the stage."""
    total = TrainStage.model_validate(stage.spec).total_steps
    points = [Point(step, 3.0, 0.1, 1.0, 100.0, stage.id, step, total, 0.0) for step in steps]
    harness.executor.runs[stage.run_id]["points"].extend(points)
    orchestrator.tick()


def leave_checkpoint(harness: Harness, stage: Stage, step: int) -> None:
    key = checkpoint_key(TrainStage.model_validate(stage.spec), step)
    with harness.artifacts.writing(key) as directory:
        (directory / "content").write_text(key)
        harness.artifacts.publish(key, directory, {})


def lose(harness: Harness, orchestrator: Orchestrator) -> None:
    harness.executor.lose_everything()
    orchestrator.tick()


def test_a_lost_attempt_that_left_a_checkpoint_does_not_count(harness: Harness, update_id: str) -> None:
    orchestrator = harness.orchestrator()
    for lost in range(OFTEN):
        orchestrator = harness.orchestrator()  # another process each time
        harness.expire_leases()
        stage = trunk_that_runs(harness, orchestrator, update_id)
        assert stage.attempt == lost + 1
        assert stage.max_attempts == MAX_ATTEMPTS + lost
        train(harness, orchestrator, stage, range(2 * lost + 1, 2 * lost + 3))
        leave_checkpoint(harness, stage, 2 * lost + 2)
        lose(harness, orchestrator)
    harness.executor.hold.clear()
    assert harness.finish(orchestrator, update_id).state == UpdateState.SUCCEEDED


def test_another_process_also_sees_that_a_lost_attempt_advanced(harness: Harness, update_id: str) -> None:
    first, second = harness.orchestrator(), harness.orchestrator()
    stage = trunk_that_runs(harness, first, update_id)
    train(harness, first, stage, [1, 2, 3])
    leave_checkpoint(harness, stage, 3)
    harness.expire_leases()
    lose(harness, second)
    stage = harness.stages(update_id)["trunk"]
    assert (stage.state, stage.attempt, stage.max_attempts) == (StageState.READY, 1, MAX_ATTEMPTS + 1)


def test_attempts_without_progress_count(harness: Harness, update_id: str) -> None:
    """Every attempt reaches the checkpoint that the first one left, and gets no further."""
    orchestrator = harness.orchestrator()
    for lost in range(MAX_ATTEMPTS + 1):
        stage = trunk_that_runs(harness, orchestrator, update_id)
        train(harness, orchestrator, stage, [1, 2, 3] if lost == 0 else [3, 4])
        if lost == 0:
            leave_checkpoint(harness, stage, 2)
        lose(harness, orchestrator)
    update = harness.update(update_id)
    assert update.state == UpdateState.FAILED
    assert update.error["code"] == WorkerLost.code
    assert harness.stages(update_id)["trunk"].attempt == MAX_ATTEMPTS + 1


def test_a_stop_does_not_count_and_the_next_attempt_starts_at_once(harness: Harness, update_id: str) -> None:
    harness.executor.hold.clear()
    stop = RunError("", Stopped.code, "asked to", retryable=True)
    harness.executor.fail[StageKind.TRAIN_TRUNK] = [stop] * OFTEN
    orchestrator = harness.orchestrator()
    for _ in range(60):
        orchestrator.tick()  # without skipping a wait
    assert harness.update(update_id).state == UpdateState.SUCCEEDED
    assert harness.stages(update_id)["trunk"].attempt == OFTEN + 1


def test_released_leases_are_taken_over_at_once(harness: Harness, update_id: str) -> None:
    first, second = harness.orchestrator(), harness.orchestrator()
    stage = trunk_that_runs(harness, first, update_id)
    second.tick()
    assert harness.stages(update_id)["trunk"].owner == first.owner
    first.release_leases()
    second.tick()
    taken = harness.stages(update_id)["trunk"]
    assert (taken.owner, taken.attempt, taken.run_id) == (second.owner, 1, stage.run_id)
    harness.executor.hold.clear()
    assert harness.finish(second, update_id).state == UpdateState.SUCCEEDED


def test_a_stage_that_ends_during_shutdown_is_recorded(harness: Harness, update_id: str) -> None:
    orchestrator = harness.orchestrator()
    trunk_that_runs(harness, orchestrator, update_id)
    harness.executor.hold.clear()
    orchestrator.release_leases()
    assert harness.stages(update_id)["trunk"].state == StageState.SUCCEEDED


def test_a_process_ends_even_if_the_database_is_unreachable(
    harness: Harness, update_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.core.errors import DatabaseUnavailable

    orchestrator = harness.orchestrator()
    trunk_that_runs(harness, orchestrator, update_id)

    def fail() -> None:
        raise DatabaseUnavailable

    monkeypatch.setattr(harness.database, "transaction", fail)
    orchestrator.release_leases()
    monkeypatch.undo()
    assert harness.stages(update_id)["trunk"].owner == orchestrator.owner
