"""If the number of workers changes in the middle of a stage, training continues over the same rows."""

from functools import partial
from pathlib import Path

import pytest

from service.artifacts import open_artifacts
from service.core.stage_specs import StageKind
from service.core.states import UpdateState
from tests.support.control_plane import serve
from tests.support.ray_cluster import RayCluster
from tests.support.ray_processes import all_gone, kill, trainers
from tests.support.recorded_rows import interpreter, rows_of, rows_read
from tests.support.undisturbed import MODEL, Undisturbed, push_second
from tests.support.waiting import until
from tests.support.watched_update import WatchedUpdate
from workers.executors.ray_executor import RayExecutor
from workers.serving.local_serving import LocalServing

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRUNK, BRANCH = StageKind.TRAIN_TRUNK, StageKind.TRAIN_BRANCH

# Relative tolerance of losses. After two ranks had summed the gradients of 100 steps, the next 505 losses differed by at
# most 9e-7, or eight units in the last place of fp32. A single wrong row in a batch of 32 changes a loss hundreds of
# times more.
ROUNDING = 1e-5


def test_changing_the_number_of_workers_keeps_the_rows_and_changes_losses_by_rounding_only(
    ray_cluster: RayCluster, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    settings = undisturbed.service_between(tmp_path / "home")
    artifacts = open_artifacts(settings.artifacts)
    over_ray = RayExecutor(artifacts, ray_cluster.dashboard_url, interpreter(tmp_path / "python"))
    serving = LocalServing(artifacts, "127.0.0.1", 0)
    with serve(settings) as plane, plane.orchestrated(over_ray, serving):
        watched = WatchedUpdate(plane.client, plane.database, artifacts, push_second(plane.client))
        resumed = [0]
        for num_workers, next_num_workers in ((1, 2), (2, 1)):
            until(lambda: watched.is_past_a_checkpoint(TRUNK, after=resumed[-1]))
            plane.client.change_model(MODEL, {"training": {"workers": next_num_workers}})
            ranks = trainers(ray_cluster.pid)
            assert len(ranks) == num_workers
            kill(sorted(ranks)[:1])
            until(partial(all_gone, ranks))
            resumed.append(watched.checkpoints(TRUNK)[-1])
        until(watched.has_ended)
        update = watched.update()
        assert update.state == UpdateState.SUCCEEDED, update.error
        assert watched.stage(TRUNK).attempt == 3
        trunk, branch = watched.spec(TRUNK), watched.spec(BRANCH)
        losses = watched.losses(TRUNK) | watched.losses(BRANCH)
        second = plane.client.model_version(MODEL, 2)
    serving.close()

    # Every rank of every attempt read its share of the rows that a single worker would read.
    order = {
        step: rows
        for stage in (trunk, branch)
        for step, rows in rows_of(artifacts, stage, range(stage.from_step + 1, stage.to_step + 1)).items()
    }
    by_rank = rows_read(artifacts)
    for reads in by_rank:
        assert [read.step for read in reads] == list(range(reads[0].step, reads[0].step + len(reads)))
        for read in reads:
            assert read.rows == order[read.step][read.rank :: read.world]
    _, to_two, to_one = resumed
    assert sorted((reads[0].step, reads[0].world, reads[0].rank) for reads in by_rank) == [
        (trunk.from_step + 1, 1, 0),
        (to_two + 1, 2, 0),
        (to_two + 1, 2, 1),
        (to_one + 1, 1, 0),
    ]
    assert max(reads[-1].step for reads in by_rank) == branch.to_step

    expected = undisturbed.losses[TRUNK] | undisturbed.losses[BRANCH]
    assert losses.keys() == expected.keys()
    for step, loss in losses.items():
        tolerance = ROUNDING if step > to_two else 0.0  # the same bits until two ranks train
        assert loss == pytest.approx(expected[step], rel=tolerance, abs=0), step
    for row, reference in zip(second.evaluations, undisturbed.second.evaluations, strict=True):
        assert row.loss == pytest.approx(reference.loss, rel=ROUNDING)
