"""The orchestrator stops on SIGTERM while it trains and serves, and the next one resumes to the same bits."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve
from ray.job_submission import JobStatus, JobSubmissionClient

from service.artifacts import open_artifacts
from service.core.stage_specs import TrainStage
from service.core.states import StageState
from tests.story.conftest import NewPlane
from tests.support.orchestrator_process import orchestrator_process, stop
from tests.support.ports import free_port
from tests.support.ray_cluster import RayCluster
from tests.support.stopping import (
    LONG,
    Streams,
    assert_resumed_exactly,
    assert_stopped_at_a_checkpoint,
    push,
    trained_steps,
    trunk,
    undisturbed,
    wait_until_it_trains,
    wait_until_released,
)

pytestmark = pytest.mark.slow_on_postgres

# Over Ray, points arrive twice a second. The first version must train for seconds after its first points.
LONGER: dict[str, Any] = LONG | {"training": LONG["training"] | {"epochs": 80}}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_without_ray_streams_complete_and_training_resumes_at_the_step_it_reached(
    new_plane: NewPlane, tmp_path: Path, processes: int
) -> None:
    plane = new_plane(serve_port=free_port(), executor="local", local_processes=processes)
    artifacts = open_artifacts(plane.settings.artifacts)
    plane.client.create_model(LONG)
    push(plane.client, 1)
    url = f"http://127.0.0.1:{plane.settings.serve_port}/v1"
    with orchestrator_process(plane.settings) as process:
        wait_until_released(plane.client, 1)
        push(plane.client, 2)
        wait_until_it_trains(plane.database, 2)
        with Streams(url) as streams:
            assert streams.under_way == streams.number
            seconds = stop(process)
    print(f"stopped in {seconds:.1f} s")
    assert process.returncode == 0
    assert seconds < 30
    assert not streams.broken
    assert streams.whole == streams.number
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models")
    reached = assert_stopped_at_a_checkpoint(plane.database, artifacts, 2)
    with orchestrator_process(plane.settings):
        wait_until_released(plane.client, 2)
    assert_resumed_exactly(plane.database, 2, reached)
    assert plane.client.costs("m").totals.wasted.tokens == 0
    if processes == 1:  # with two processes a line trains with fewer threads, so to other bits
        exports = [plane.client.model_version("m", number).artifact.sha256 for number in (1, 2)]
        assert exports == undisturbed(tmp_path / "undisturbed", LONG, 2)


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_job_outlives_the_stopped_orchestrator_and_the_next_one_adopts_it(
    new_plane: NewPlane, tmp_path: Path, ray_cluster: RayCluster
) -> None:
    plane = new_plane(serve_port=free_port(), executor="ray", ray_address=ray_cluster.address)
    jobs = JobSubmissionClient(ray_cluster.dashboard_url)
    url = f"http://127.0.0.1:{plane.settings.serve_port}/v1/models"
    plane.client.create_model(LONGER)
    try:
        with orchestrator_process(plane.settings) as process:
            push(plane.client, 1)
            wait_until_it_trains(plane.database, 1)
            seconds = stop(process)
            stage = trunk(plane.database, 1)
            assert stage is not None
            assert stage.run_id is not None
            assert jobs.get_job_status(stage.run_id) == JobStatus.RUNNING
        print(f"stopped in {seconds:.1f} s")
        assert process.returncode == 0
        assert seconds < 10, "it must not wait for jobs that run without it"
        assert httpx.get(url).is_success
        with orchestrator_process(plane.settings):
            wait_until_released(plane.client, 1)
    finally:
        serve.shutdown()
    stage = trunk(plane.database, 1)
    assert stage is not None
    assert (stage.state, stage.attempt) == (StageState.SUCCEEDED, 1)
    spec = TrainStage.model_validate(stage.spec)
    assert trained_steps(plane.database, stage) == list(range(1, spec.to_step + 1))
    assert [plane.client.model_version("m", 1).artifact.sha256] == undisturbed(
        tmp_path / "undisturbed", LONGER, 1
    )
