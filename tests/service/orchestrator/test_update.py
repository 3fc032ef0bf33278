"""One update through the loop: the plan in two parts, sharing, failures, cancel, retry, gate, release."""

from typing import Any

from service.core.executor import RunError
from service.core.retry import MAX_ATTEMPTS
from service.core.stage_specs import StageKind
from service.core.states import ModelVersionState, ReleaseState, StageState, UpdateState
from service.operations.releases import release_version, roll_back
from service.operations.updates import cancel_update, retry_update
from service.store import datasets, metrics, models, releases, updates
from tests.service.orchestrator.conftest import Harness
from tests.support.rows import add_dataset, add_model

TRANSIENT = RunError("", "worker_lost", "the worker is gone", retryable=True)
DIVERGED = RunError("", "diverged", "the loss is nan", retryable=False)


def history(harness: Harness, model_id: str) -> Any:
    with harness.database.reading() as session:
        return [(row.state, row.model_version_id) for row in releases.history(session, model_id)]


def served_number(harness: Harness, model_id: str) -> Any:
    with harness.database.reading() as session:
        served = models.served(session, model_id)
        return served.number if served else None


def test_a_data_version_becomes_the_served_version(harness: Harness) -> None:
    model_id = harness.add_model()
    update_id = harness.add_update(model_id)
    row = harness.finish(harness.orchestrator(), update_id)
    assert row.state == UpdateState.SUCCEEDED
    assert (row.branch_point, row.final_step) == (90, 100)
    assert list(harness.stages(update_id)) == [
        "tokenizer", "pack-1", "trunk", "branch", "export", "evaluate", "gate", "release",
    ]  # fmt: skip
    assert served_number(harness, model_id) == 1
    assert harness.serving.swaps == [("m", 1)]


def test_trunk_and_branch_share_one_run(harness: Harness) -> None:
    update_id = harness.add_update(harness.add_model())
    harness.finish(harness.orchestrator(), update_id)
    trunk = harness.stages(update_id)["trunk"]
    branch = harness.stages(update_id)["branch"]
    assert f"run-{trunk.id}-a1" in harness.executor.submitted
    assert f"run-{branch.id}-a1" not in harness.executor.submitted
    assert (trunk.attempt, branch.attempt) == (1, 1)


def test_points_and_progress_are_recorded(harness: Harness) -> None:
    update_id = harness.add_update(harness.add_model())
    harness.finish(harness.orchestrator(), update_id)
    trunk = harness.stages(update_id)["trunk"]
    with harness.database.reading() as session:
        assert [point.step for point in metrics.points(session, trunk.id)] == [90]
    assert trunk.progress["loss"] == 3.0


def test_the_next_version_continues_from_the_trunk(harness: Harness) -> None:
    model_id = harness.add_model()
    first = harness.add_update(model_id)
    harness.add_version(2)
    second = harness.add_update(model_id, 2)
    orchestrator = harness.orchestrator()
    harness.finish(orchestrator, first)
    row = harness.finish(orchestrator, second)
    assert (row.branch_point, row.final_step) == (180, 200)
    trunk = harness.stages(second)["trunk"]
    assert (trunk.spec["from_step"], trunk.spec["to_step"]) == (90, 180)
    assert harness.stages(second)["pack-1"].reused
    with harness.database.reading() as session:
        evaluations = models.version(session, model_id, 1).evaluations
    # The first version was measured on the second's slice too, for the gate to compare.
    assert [row["slice"] for row in evaluations] == ["v1", "v2"]
    assert [state for state, _ in history(harness, model_id)] == [ReleaseState.ENDED, ReleaseState.LIVE]


def test_updates_of_a_model_run_one_at_a_time_in_data_order(harness: Harness) -> None:
    model_id = harness.add_model(versions=2)
    later, earlier = harness.add_update(model_id, 2), harness.add_update(model_id, 1)
    orchestrator = harness.orchestrator()
    orchestrator.tick()
    assert harness.update(earlier).state == UpdateState.RUNNING
    assert harness.update(later).state == UpdateState.PENDING
    harness.finish(orchestrator, earlier)
    harness.finish(orchestrator, later)
    assert served_number(harness, model_id) == 2


def test_equal_lines_share_every_stage(harness: Harness) -> None:
    first = harness.add_update(harness.add_model("m"))
    second = harness.add_update(harness.add_model("n"))
    orchestrator = harness.orchestrator()
    harness.finish(orchestrator, first)
    harness.finish(orchestrator, second)
    assert len(harness.executor.executed) == len(set(harness.executor.executed))
    reused = {name for name, stage in harness.stages(second).items() if stage.reused}
    both_ran = {name for name, stage in harness.stages(first).items() if stage.reused}
    assert {"tokenizer", "pack-1", "trunk", "branch", "export", "evaluate"} <= reused | both_ran


def test_a_transient_failure_is_tried_again_after_a_wait(harness: Harness) -> None:
    harness.executor.fail[StageKind.PACK] = [TRANSIENT, TRANSIENT]
    update_id = harness.add_update(harness.add_model())
    assert harness.finish(harness.orchestrator(), update_id).state == UpdateState.SUCCEEDED
    assert harness.stages(update_id)["pack-1"].attempt == 3


def test_training_that_the_next_attempt_continues_is_not_wasted(harness: Harness) -> None:
    harness.executor.fail[StageKind.TRAIN_TRUNK] = [TRANSIENT]
    update_id = harness.add_update(harness.add_model())
    harness.executor.carried_device_seconds = 1e9
    harness.finish(harness.orchestrator(), update_id)
    trunk = harness.stages(update_id)["trunk"]
    assert (trunk.attempt, trunk.wasted_seconds) == (2, 0.0)


def test_a_failed_stage_waits_before_its_next_attempt(harness: Harness) -> None:
    harness.executor.fail[StageKind.TOKENIZER] = [TRANSIENT]
    update_id = harness.add_update(harness.add_model())
    orchestrator = harness.orchestrator()
    for _ in range(5):
        orchestrator.tick()
    stage = harness.stages(update_id)["tokenizer"]
    assert (stage.state, stage.attempt) == (StageState.READY, 1)
    assert stage.error["code"] == "worker_lost"
    assert stage.ready_at > stage.started_at


def test_a_stage_fails_when_its_attempts_run_out(harness: Harness) -> None:
    harness.executor.fail[StageKind.PACK] = [TRANSIENT] * MAX_ATTEMPTS
    update_id = harness.add_update(harness.add_model())
    row = harness.finish(harness.orchestrator(), update_id)
    assert row.state == UpdateState.FAILED
    assert row.error["stage"] == "pack-1"
    assert harness.stages(update_id)["pack-1"].attempt == MAX_ATTEMPTS


def test_divergence_is_not_retried_and_a_user_retry_continues_from_the_last_good_stage(
    harness: Harness,
) -> None:
    harness.executor.fail[StageKind.TRAIN_TRUNK] = [DIVERGED]
    update_id = harness.add_update(harness.add_model())
    orchestrator = harness.orchestrator()
    assert harness.finish(orchestrator, update_id).state == UpdateState.FAILED
    assert harness.stages(update_id)["trunk"].error["code"] == "diverged"
    assert harness.stages(update_id)["branch"].state == StageState.CANCELLED
    retry_update(harness.database, update_id)
    assert harness.finish(orchestrator, update_id).state == UpdateState.SUCCEEDED
    assert harness.stages(update_id)["pack-1"].attempt == 1
    assert len(harness.executor.executed) == len(set(harness.executor.executed))


def test_a_branch_whose_trunk_failed_in_the_same_run_loses_no_attempt(harness: Harness) -> None:
    harness.executor.fail[StageKind.TRAIN_TRUNK] = [TRANSIENT]
    update_id = harness.add_update(harness.add_model())
    harness.finish(harness.orchestrator(), update_id)
    assert harness.stages(update_id)["trunk"].attempt == 2
    assert harness.stages(update_id)["branch"].attempt == 1


def test_a_branch_that_fails_behind_its_trunk_is_retried_alone(harness: Harness) -> None:
    harness.executor.fail[StageKind.TRAIN_BRANCH] = [TRANSIENT]
    update_id = harness.add_update(harness.add_model())
    harness.finish(harness.orchestrator(), update_id)
    branch = harness.stages(update_id)["branch"]
    assert (harness.stages(update_id)["trunk"].attempt, branch.attempt) == (1, 2)
    assert f"run-{branch.id}-a2" in harness.executor.submitted


def test_a_branch_starts_when_its_trunk_has_ended(harness: Harness) -> None:
    """They are claimed together for one run, but each stage counts its own time."""
    harness.executor.hold.add(StageKind.TRAIN_BRANCH)
    update_id = harness.add_update(harness.add_model())
    orchestrator = harness.orchestrator()
    while (
        harness.stages(update_id).get("trunk") is None
        or harness.stages(update_id)["trunk"].state != "running"
    ):
        orchestrator.tick()
    claimed = harness.stages(update_id)
    assert claimed["branch"].started_at == claimed["trunk"].started_at
    orchestrator.tick()
    began = harness.stages(update_id)
    assert began["trunk"].state == StageState.SUCCEEDED
    assert began["branch"].state == StageState.RUNNING
    assert began["branch"].started_at > claimed["trunk"].started_at


def test_an_unreadable_manifest_behind_a_ready_stage_blocks_no_other_stage(harness: Harness) -> None:
    first = harness.add_update(harness.add_model())
    harness.finish(harness.orchestrator(), first)
    branch = harness.stages(first)["branch"]
    [manifest] = (harness.artifacts.root / branch.key).glob("manifest.json")
    manifest.write_text("{")
    trunk = harness.stages(first)["trunk"]
    [trunk_manifest] = (harness.artifacts.root / trunk.key).glob("manifest.json")
    trunk_manifest.unlink()
    harness.add_update(harness.add_model("twin"))
    with harness.database.transaction() as session:
        dataset = add_dataset(session, "e")
        other = add_model(session, dataset, "other")
        other_update = updates.add(session, other, datasets.version(session, dataset.id, 1)).id
    assert harness.finish(harness.orchestrator(), other_update).state == UpdateState.SUCCEEDED


def test_cancelling_ends_the_run_and_the_next_update_starts(harness: Harness) -> None:
    harness.executor.hold = {StageKind.TRAIN_TRUNK}
    model_id = harness.add_model(versions=2)
    first, second = harness.add_update(model_id, 1), harness.add_update(model_id, 2)
    orchestrator = harness.orchestrator()
    for _ in range(8):
        orchestrator.tick()
    trunk = harness.stages(first)["trunk"]
    assert trunk.state == StageState.RUNNING
    cancel_update(harness.database, first)
    harness.executor.hold = set()
    assert harness.finish(orchestrator, second).state == UpdateState.SUCCEEDED
    assert trunk.run_id in harness.executor.cancelled
    assert harness.stages(first)["trunk"].run_id is None
    assert harness.update(first).state == UpdateState.CANCELLED


def test_a_rejected_version_leaves_the_served_one_alone(harness: Harness) -> None:
    model_id = harness.add_model()
    orchestrator = harness.orchestrator()
    harness.finish(orchestrator, harness.add_update(model_id))
    harness.add_version(2)
    measured = iter([9.0, 9.0, 3.0])  # candidate on v1 and v2, then the served version on v2
    harness.executor.losses = lambda name: next(measured)
    update_id = harness.add_update(model_id, 2)
    assert harness.finish(orchestrator, update_id).state == UpdateState.REJECTED
    assert served_number(harness, model_id) == 1
    assert harness.serving.answers == {"m": 1}
    assert harness.stages(update_id)["release"].state == StageState.CANCELLED
    with harness.database.reading() as session:
        version = models.version(session, model_id, 2)
        assert version.state == ModelVersionState.REJECTED
        assert not version.gate["passed"]


def test_a_nan_loss_never_passes(harness: Harness) -> None:
    harness.executor.losses = lambda name: float("nan")
    assert (
        harness.finish(harness.orchestrator(), harness.add_update(harness.add_model())).state
        == UpdateState.REJECTED
    )


def test_a_version_that_cannot_load_fails_its_release_and_the_old_one_stays(harness: Harness) -> None:
    model_id = harness.add_model()
    orchestrator = harness.orchestrator()
    harness.finish(orchestrator, harness.add_update(model_id))
    harness.add_version(2)
    harness.serving.broken = {2}
    row = harness.finish(orchestrator, harness.add_update(model_id, 2))
    assert (row.state, row.error["code"]) == (UpdateState.FAILED, "release_failed")
    assert served_number(harness, model_id) == 1
    assert [state for state, _ in history(harness, model_id)] == [ReleaseState.LIVE, ReleaseState.FAILED]
    orchestrator.tick()
    assert harness.serving.answers == {"m": 1}


def test_rolling_back_releases_what_was_served_before(harness: Harness) -> None:
    model_id = harness.add_model(versions=2)
    orchestrator = harness.orchestrator()
    for number in (1, 2):
        harness.finish(orchestrator, harness.add_update(model_id, number))
    roll_back(harness.database, "m", by="somebody")
    orchestrator.tick()
    assert served_number(harness, model_id) == 1
    assert harness.serving.answers == {"m": 1}


def test_the_last_requested_release_wins(harness: Harness) -> None:
    model_id = harness.add_model(versions=2)
    orchestrator = harness.orchestrator()
    for number in (1, 2):
        harness.finish(orchestrator, harness.add_update(model_id, number))
    release_version(harness.database, "m", 1, by="a")
    release_version(harness.database, "m", 2, by="b")
    orchestrator.tick()
    assert served_number(harness, model_id) == 2
    states = [state for state, _ in history(harness, model_id)]
    assert states == [ReleaseState.ENDED, ReleaseState.ENDED, ReleaseState.SUPERSEDED, ReleaseState.LIVE]


def test_the_orchestrator_waits_for_an_unavailable_cluster(harness: Harness) -> None:
    update_id = harness.add_update(harness.add_model())
    orchestrator = harness.orchestrator()
    harness.executor.unavailable = True
    for _ in range(3):
        orchestrator.tick()
    harness.executor.unavailable = False
    assert harness.finish(orchestrator, update_id).state == UpdateState.SUCCEEDED


def test_an_update_to_data_behind_the_trunk_fails_with_the_reason(harness: Harness) -> None:
    model_id = harness.add_model(versions=2)
    orchestrator = harness.orchestrator()
    harness.finish(orchestrator, harness.add_update(model_id, 2))
    row = harness.finish(orchestrator, harness.add_update(model_id, 1))
    assert row.state == UpdateState.FAILED
    assert "past the last step" in row.error["detail"]
