"""One update through the loop: the plan in two parts, sharing, failures, cancel, retry, gate, release."""

from service.core.executor import RunError
from service.core.retry import MAX_ATTEMPTS
from service.core.stage_specs import StageKind
from service.core.states import ModelVersionState, ReleaseState, StageState, UpdateState
from service.operations.releases import release_version, roll_back
from service.operations.updates import cancel_update, retry_update
from service.store import datasets, models, releases, stages, updates
from tests.support.rows import add_dataset, add_model

TRANSIENT = RunError("", "worker_lost", "the worker is gone", retryable=True)
DIVERGED = RunError("", "diverged", "the loss is nan", retryable=False)


def history(house, model_id):
    with house.database.reading() as session:
        return [(row.state, row.model_version_id) for row in releases.history(session, model_id)]


def served_number(house, model_id):
    with house.database.reading() as session:
        served = models.served(session, model_id)
        return served.number if served else None


def test_a_data_version_becomes_the_served_version(house):
    model_id = house.add_model()
    update_id = house.add_update(model_id)
    row = house.finish(house.orchestrator(), update_id)
    assert row.state == UpdateState.SUCCEEDED
    assert (row.branch_point, row.final_step) == (90, 100)
    assert list(house.stages(update_id)) == [
        "tokenizer", "pack-1", "trunk", "branch", "export", "evaluate", "gate", "release",
    ]  # fmt: skip
    assert served_number(house, model_id) == 1
    assert house.serving.swaps == [("m", 1)]


def test_trunk_and_branch_share_one_run(house):
    update_id = house.add_update(house.add_model())
    house.finish(house.orchestrator(), update_id)
    trunk = house.stages(update_id)["trunk"]
    branch = house.stages(update_id)["branch"]
    assert f"run-{trunk.id}-a1" in house.executor.submitted
    assert f"run-{branch.id}-a1" not in house.executor.submitted
    assert (trunk.attempt, branch.attempt) == (1, 1)


def test_points_and_progress_are_written_down(house):
    update_id = house.add_update(house.add_model())
    house.finish(house.orchestrator(), update_id)
    trunk = house.stages(update_id)["trunk"]
    with house.database.reading() as session:
        assert [point.step for point in stages.points(session, trunk.id)] == [90]
    assert trunk.progress["loss"] == 3.0


def test_the_next_version_trains_on_from_where_the_trunk_stands(house):
    model_id = house.add_model()
    first = house.add_update(model_id)
    house.add_version(2)
    second = house.add_update(model_id, 2)
    orchestrator = house.orchestrator()
    house.finish(orchestrator, first)
    row = house.finish(orchestrator, second)
    assert (row.branch_point, row.final_step) == (180, 200)
    trunk = house.stages(second)["trunk"]
    assert (trunk.spec["from_step"], trunk.spec["to_step"]) == (90, 180)
    assert house.stages(second)["pack-1"].reused
    with house.database.reading() as session:
        evaluations = models.version(session, model_id, 1).evaluations
    # The first version was measured on the second's slice too, so that the gate could compare.
    assert [row["slice"] for row in evaluations] == ["v1", "v2"]
    assert [state for state, _ in history(house, model_id)] == [ReleaseState.ENDED, ReleaseState.LIVE]


def test_updates_of_one_model_run_one_at_a_time_in_order_of_their_data(house):
    model_id = house.add_model(versions=2)
    later, earlier = house.add_update(model_id, 2), house.add_update(model_id, 1)
    orchestrator = house.orchestrator()
    orchestrator.tick()
    assert house.update(earlier).state == UpdateState.RUNNING
    assert house.update(later).state == UpdateState.PENDING
    house.finish(orchestrator, earlier)
    house.finish(orchestrator, later)
    assert served_number(house, model_id) == 2


def test_equal_lines_share_every_stage(house):
    first = house.add_update(house.add_model("m"))
    second = house.add_update(house.add_model("n"))
    orchestrator = house.orchestrator()
    house.finish(orchestrator, first)
    house.finish(orchestrator, second)
    assert len(house.executor.executed) == len(set(house.executor.executed))
    reused = {name for name, stage in house.stages(second).items() if stage.reused}
    both_ran = {name for name, stage in house.stages(first).items() if stage.reused}
    assert {"tokenizer", "pack-1", "trunk", "branch", "export", "evaluate"} <= reused | both_ran


def test_a_transient_failure_is_tried_again_after_a_wait(house):
    house.executor.fail[StageKind.PACK] = [TRANSIENT, TRANSIENT]
    update_id = house.add_update(house.add_model())
    assert house.finish(house.orchestrator(), update_id).state == UpdateState.SUCCEEDED
    assert house.stages(update_id)["pack-1"].attempt == 3


def test_what_a_failed_attempt_had_trained_and_the_next_went_on_from_is_not_wasted(house):
    house.executor.fail[StageKind.TRAIN_TRUNK] = [TRANSIENT]
    update_id = house.add_update(house.add_model())
    house.executor.carried_device_seconds = 1e9
    house.finish(house.orchestrator(), update_id)
    trunk = house.stages(update_id)["trunk"]
    assert (trunk.attempt, trunk.wasted_seconds) == (2, 0.0)


def test_it_waits_before_it_tries_again(house):
    house.executor.fail[StageKind.TOKENIZER] = [TRANSIENT]
    update_id = house.add_update(house.add_model())
    orchestrator = house.orchestrator()
    for _ in range(5):
        orchestrator.tick()
    stage = house.stages(update_id)["tokenizer"]
    assert (stage.state, stage.attempt) == (StageState.READY, 1)
    assert stage.error["code"] == "worker_lost"
    assert stage.ready_at > stage.started_at


def test_attempts_run_out(house):
    house.executor.fail[StageKind.PACK] = [TRANSIENT] * MAX_ATTEMPTS
    update_id = house.add_update(house.add_model())
    row = house.finish(house.orchestrator(), update_id)
    assert row.state == UpdateState.FAILED
    assert row.error["stage"] == "pack-1"
    assert house.stages(update_id)["pack-1"].attempt == MAX_ATTEMPTS


def test_divergence_is_not_tried_again_and_a_retry_goes_on_from_the_last_good_stage(house):
    house.executor.fail[StageKind.TRAIN_TRUNK] = [DIVERGED]
    update_id = house.add_update(house.add_model())
    orchestrator = house.orchestrator()
    assert house.finish(orchestrator, update_id).state == UpdateState.FAILED
    assert house.stages(update_id)["trunk"].error["code"] == "diverged"
    assert house.stages(update_id)["branch"].state == StageState.CANCELLED
    retry_update(house.database, update_id)
    assert house.finish(orchestrator, update_id).state == UpdateState.SUCCEEDED
    assert house.stages(update_id)["pack-1"].attempt == 1
    assert len(house.executor.executed) == len(set(house.executor.executed))


def test_a_branch_whose_trunk_failed_in_the_same_run_loses_no_attempt(house):
    house.executor.fail[StageKind.TRAIN_TRUNK] = [TRANSIENT]
    update_id = house.add_update(house.add_model())
    house.finish(house.orchestrator(), update_id)
    assert house.stages(update_id)["trunk"].attempt == 2
    assert house.stages(update_id)["branch"].attempt == 1


def test_a_branch_that_fails_behind_its_trunk_is_tried_alone(house):
    house.executor.fail[StageKind.TRAIN_BRANCH] = [TRANSIENT]
    update_id = house.add_update(house.add_model())
    house.finish(house.orchestrator(), update_id)
    branch = house.stages(update_id)["branch"]
    assert (house.stages(update_id)["trunk"].attempt, branch.attempt) == (1, 2)
    assert f"run-{branch.id}-a2" in house.executor.submitted


def test_a_branch_begins_when_its_trunk_has_ended(house):
    """Claimed together, for one run: the time of the one must not be counted to the other."""
    house.executor.hold.add(StageKind.TRAIN_BRANCH)
    update_id = house.add_update(house.add_model())
    orchestrator = house.orchestrator()
    while house.stages(update_id).get("trunk") is None or house.stages(update_id)["trunk"].state != "running":
        orchestrator.tick()
    claimed = house.stages(update_id)
    assert claimed["branch"].started_at == claimed["trunk"].started_at
    orchestrator.tick()
    began = house.stages(update_id)
    assert began["trunk"].state == StageState.SUCCEEDED
    assert began["branch"].state == StageState.RUNNING
    assert began["branch"].started_at > claimed["trunk"].started_at


def test_a_manifest_that_cannot_be_read_behind_a_ready_stage_stops_nobody_else(house):
    first = house.add_update(house.add_model())
    house.finish(house.orchestrator(), first)
    branch = house.stages(first)["branch"]
    [manifest] = (house.artifacts.root / branch.key).glob("manifest.json")
    manifest.write_text("{")
    trunk = house.stages(first)["trunk"]
    [trunk_manifest] = (house.artifacts.root / trunk.key).glob("manifest.json")
    trunk_manifest.unlink()
    house.add_update(house.add_model("twin"))
    with house.database.transaction() as session:
        dataset = add_dataset(session, "e")
        other = add_model(session, dataset, "other")
        other_update = updates.add(session, other, datasets.version(session, dataset.id, 1)).id
    assert house.finish(house.orchestrator(), other_update).state == UpdateState.SUCCEEDED


def test_cancelling_ends_the_run_and_the_next_update_goes_on(house):
    house.executor.hold = {StageKind.TRAIN_TRUNK}
    model_id = house.add_model(versions=2)
    first, second = house.add_update(model_id, 1), house.add_update(model_id, 2)
    orchestrator = house.orchestrator()
    for _ in range(8):
        orchestrator.tick()
    trunk = house.stages(first)["trunk"]
    assert trunk.state == StageState.RUNNING
    cancel_update(house.database, first)
    house.executor.hold = set()
    assert house.finish(orchestrator, second).state == UpdateState.SUCCEEDED
    assert trunk.run_id in house.executor.cancelled
    assert house.stages(first)["trunk"].run_id is None
    assert house.update(first).state == UpdateState.CANCELLED


def test_a_rejected_version_leaves_the_served_one_alone(house):
    model_id = house.add_model()
    orchestrator = house.orchestrator()
    house.finish(orchestrator, house.add_update(model_id))
    house.add_version(2)
    measured = iter([9.0, 9.0, 3.0])  # candidate on v1 and v2, then the served version on v2
    house.executor.losses = lambda name: next(measured)
    update_id = house.add_update(model_id, 2)
    assert house.finish(orchestrator, update_id).state == UpdateState.REJECTED
    assert served_number(house, model_id) == 1
    assert house.serving.answers == {"m": 1}
    assert house.stages(update_id)["release"].state == StageState.CANCELLED
    with house.database.reading() as session:
        version = models.version(session, model_id, 2)
        assert version.state == ModelVersionState.REJECTED
        assert not version.gate["passed"]


def test_a_loss_that_is_not_a_number_never_passes(house):
    house.executor.losses = lambda name: float("nan")
    assert (
        house.finish(house.orchestrator(), house.add_update(house.add_model())).state == UpdateState.REJECTED
    )


def test_a_version_that_cannot_be_loaded_fails_its_release_and_the_old_one_stays(house):
    model_id = house.add_model()
    orchestrator = house.orchestrator()
    house.finish(orchestrator, house.add_update(model_id))
    house.add_version(2)
    house.serving.broken = {2}
    row = house.finish(orchestrator, house.add_update(model_id, 2))
    assert (row.state, row.error["code"]) == (UpdateState.FAILED, "release_failed")
    assert served_number(house, model_id) == 1
    assert [state for state, _ in history(house, model_id)] == [ReleaseState.LIVE, ReleaseState.FAILED]
    orchestrator.tick()
    assert house.serving.answers == {"m": 1}


def test_rolling_back_releases_what_was_served_before(house):
    model_id = house.add_model(versions=2)
    orchestrator = house.orchestrator()
    for number in (1, 2):
        house.finish(orchestrator, house.add_update(model_id, number))
    roll_back(house.database, "m", by="somebody")
    orchestrator.tick()
    assert served_number(house, model_id) == 1
    assert house.serving.answers == {"m": 1}


def test_the_last_release_asked_for_wins(house):
    model_id = house.add_model(versions=2)
    orchestrator = house.orchestrator()
    for number in (1, 2):
        house.finish(orchestrator, house.add_update(model_id, number))
    release_version(house.database, "m", 1, by="a")
    release_version(house.database, "m", 2, by="b")
    orchestrator.tick()
    assert served_number(house, model_id) == 2
    states = [state for state, _ in history(house, model_id)]
    assert states == [ReleaseState.ENDED, ReleaseState.ENDED, ReleaseState.SUPERSEDED, ReleaseState.LIVE]


def test_a_cluster_that_is_away_is_waited_for(house):
    update_id = house.add_update(house.add_model())
    orchestrator = house.orchestrator()
    house.executor.unavailable = True
    for _ in range(3):
        orchestrator.tick()
    house.executor.unavailable = False
    assert house.finish(orchestrator, update_id).state == UpdateState.SUCCEEDED


def test_an_update_to_data_that_the_trunk_has_passed_fails_with_the_reason(house):
    model_id = house.add_model(versions=2)
    orchestrator = house.orchestrator()
    house.finish(orchestrator, house.add_update(model_id, 2))
    row = house.finish(orchestrator, house.add_update(model_id, 1))
    assert row.state == UpdateState.FAILED
    assert "past the last step" in row.error["detail"]
