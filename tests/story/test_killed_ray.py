"""SIGKILL to parts of `pathswitch up`'s Ray during training: the line ends with the same bits and costs."""

from pathlib import Path

import pytest

from api.client import Client
from service.artifacts import open_artifacts
from service.core.errors import WorkerLost
from service.core.stage_specs import StageKind
from service.core.states import UpdateState
from service.store.database import Database
from tests.support.ray_processes import VICTIMS, all_gone, kill, trainers
from tests.support.undisturbed import CHECKPOINT_EVERY, MODEL, Undisturbed, push_second
from tests.support.up import running_up
from tests.support.waiting import until
from tests.support.watched_update import WatchedUpdate

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize(
    ("victim", "kind"),
    [
        ("worker", StageKind.TRAIN_TRUNK),
        ("controller", StageKind.TRAIN_BRANCH),
        ("driver", StageKind.TRAIN_TRUNK),
        ("board", StageKind.TRAIN_TRUNK),
        ("raylet", StageKind.TRAIN_BRANCH),
        ("ray", StageKind.TRAIN_TRUNK),
    ],
)
def test_training_resumes_from_the_last_checkpoint_after_a_kill_and_reaches_the_same_bits(
    undisturbed: Undisturbed, tmp_path: Path, victim: str, kind: StageKind
) -> None:
    settings = undisturbed.service_between(tmp_path / "home")
    database, artifacts = Database(settings.database), open_artifacts(settings.artifacts)
    with running_up(settings) as up, Client(up.urls["api"]) as client:
        watched = WatchedUpdate(client, database, artifacts, push_second(client))
        until(lambda: watched.is_past_a_checkpoint(kind))
        [trainer] = trainers(up.process.pid)
        victims = VICTIMS[victim](up.process.pid)
        assert victims
        kill(victims)
        # A trainer may run for a moment after its parent is killed.
        until(lambda: all_gone({trainer} | victims))
        committed, started = watched.checkpoints(kind)[-1], watched.checkpoints_started(kind)[-1]
        until(lambda: bool(watched.failed_attempts()))
        last_step = max(watched.losses(kind))
        until(watched.has_ended)

        update, row = watched.update(), watched.row(kind)
        assert update.state == UpdateState.SUCCEEDED, update.error
        [failed] = watched.failed_attempts()
        assert (failed["stage"], failed["attempt"], failed["code"]) == (row.id, 1, WorkerLost.code)
        assert {stage.kind for stage in update.stages if stage.attempt > 1} == {kind}
        assert row.attempt == 2

        # No step before the last checkpoint was trained again. At most one interval was lost: the next checkpoint had
        # not been started, or was being written.
        spec, result = watched.spec(kind), row.result
        assert result is not None
        assert spec.from_step < result["resumed_from_step"] == committed
        assert last_step - committed <= CHECKPOINT_EVERY
        assert started in (committed, committed + CHECKPOINT_EVERY)

        second, costs = client.model_version(MODEL, 2), client.costs(MODEL)
        assert second.artifact.sha256 == undisturbed.second.artifact.sha256
        assert second.evaluations == undisturbed.second.evaluations
        assert {each: watched.losses(each) for each in undisturbed.losses} == undisturbed.losses
        assert costs.totals.spent.tokens == undisturbed.costs.totals.spent.tokens
        assert undisturbed.costs.totals.wasted.device_seconds == 0 < costs.totals.wasted.device_seconds
    database.close()
