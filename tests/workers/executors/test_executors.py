"""Both executors pass one contract: a trunk segment and its branch, in process and as a Ray job."""

import os
import threading
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import TypeVar

import pytest

from service.artifacts import Artifacts, LocalArtifacts
from service.core.errors import Unavailable
from service.core.executor import Executor, Run, RunReport, RunState, StageCall
from service.core.plan import checkpoint_key, run_key, trunk_key
from service.core.stage_specs import StageKind, TrainStage
from service.core.stopping import DRAIN_SECONDS
from tests.support.training import branch_stage, prepare_line, trunk_stage
from workers.executors import local_executor
from workers.executors.local_executor import LocalExecutor
from workers.stages.context import StageContext

PATIENCE_SECONDS = 240.0
T = TypeVar("T")


def chain(artifacts: Artifacts, run_id: str, workers: int = 1) -> Run:
    small = prepare_line(artifacts, (60,))
    trunk = trunk_stage(small, 6)
    branch = branch_stage(small, 6, 4)
    calls = (
        (StageKind.TRAIN_TRUNK, trunk_key(trunk.line, trunk.ledger, 6), trunk),
        (StageKind.TRAIN_BRANCH, run_key(StageKind.TRAIN_BRANCH, branch), branch),
    )
    return Run(
        run_id,
        tuple(StageCall(k, 1, k, key, spec.model_dump(mode="json")) for k, key, spec in calls),
        workers,
    )


def long_run(artifacts: Artifacts, run_id: str, seed: int) -> Run:
    """A run with more steps than any test waits for."""
    small = prepare_line(artifacts, (60,), seed=seed, epochs=1000)
    trunk = trunk_stage(small, small.ledger[0].steps)
    key = trunk_key(trunk.line, trunk.ledger, trunk.to_step)
    return Run(run_id, (StageCall("trunk", 1, StageKind.TRAIN_TRUNK, key, trunk.model_dump(mode="json")),))


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def patiently(call: Callable[[], T]) -> T:
    """Retry while Ray is unavailable, for example while an actor starts, as the orchestrator does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return call()
        except Unavailable:
            if time.monotonic() > deadline:
                raise


def run_to_the_end(executor: Executor, run: Run) -> tuple[RunReport, list[tuple[str, int]]]:
    """Submit twice (the second call adopts), and poll to the end. Returns the last report and all points."""
    assert patiently(lambda: executor.poll(run.id, 0)).state == RunState.LOST
    patiently(lambda: executor.submit(run))
    patiently(lambda: executor.submit(run))
    cursor, points = 0, []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        report = patiently(lambda at=cursor: executor.poll(run.id, at))
        cursor = report.cursor
        points += [(point.stage_id, point.step) for point in report.points]
        if report.state != RunState.RUNNING:
            return report, points
        time.sleep(0.2)
    pytest.fail("the run did not end")


def check_contract(artifacts: Artifacts, executor: Executor, run: Run) -> None:
    report, points = run_to_the_end(executor, run)
    assert report.error is None
    assert report.state == RunState.SUCCEEDED
    assert report.finished == {"train_trunk", "train_branch"}
    assert points == [("train_trunk", s) for s in range(1, 7)] + [("train_branch", s) for s in range(7, 11)]
    assert all(artifacts.manifest(call.key) for call in run.calls)


def trained_in_process(artifacts: Artifacts) -> Run:
    """Train the chain without Ray, as a reference."""
    executor = LocalExecutor(artifacts)
    run = chain(artifacts, "run-a1")
    run_to_the_end(executor, run)
    executor.close()
    return run


def weights(artifacts: Artifacts, key: str) -> list[str]:
    manifest = artifacts.manifest(key)
    assert manifest is not None
    return [file.sha256 for file in manifest.files if file.path.endswith(".safetensors")]


def test_the_local_executor_passes_the_contract(tmp_path: Path) -> None:
    artifacts = LocalArtifacts(tmp_path)
    executor = LocalExecutor(artifacts)
    check_contract(artifacts, executor, chain(artifacts, "run-a1"))
    executor.close()


def test_side_by_side_processes_pass_it_and_train_the_same_bits(tmp_path: Path) -> None:
    alone, beside = LocalArtifacts(tmp_path / "alone"), LocalArtifacts(tmp_path / "beside")
    run = trained_in_process(alone)
    executor = LocalExecutor(beside, processes=2)
    assert executor.capabilities(1).threads == max(1, len(os.sched_getaffinity(0)) // 2)
    check_contract(beside, executor, chain(beside, "run-a1"))
    executor.close()
    for call in run.calls:
        assert weights(beside, call.key) == weights(alone, call.key)


def test_two_runs_train_at_once_and_each_leaves_a_checkpoint_when_stopped(tmp_path: Path) -> None:
    artifacts = LocalArtifacts(tmp_path)
    executor = LocalExecutor(artifacts, processes=2)
    runs = [long_run(artifacts, f"run-{n}", seed=n) for n in range(2)]
    for run in runs:
        executor.submit(run)
    until(lambda: all(executor.poll(run.id, 0).points for run in runs))
    executor.close()
    for run in runs:
        report = executor.poll(run.id, 0)
        assert report.state == RunState.FAILED
        assert report.error is not None
        assert report.error.code == "stopped"
        assert report.error.retryable
        stage = TrainStage.model_validate(run.calls[0].spec)
        assert artifacts.manifest(checkpoint_key(stage, report.points[-1].step)) is not None


def test_the_executor_accepts_runs_after_it_has_stopped_all(tmp_path: Path) -> None:
    artifacts = LocalArtifacts(tmp_path)
    executor = LocalExecutor(artifacts)
    active, queued = (long_run(artifacts, f"run-{n}", seed=n) for n in range(2))
    executor.submit(active)
    until(lambda: bool(executor.poll(active.id, 0).points))
    executor.submit(queued)
    executor.stop_all()
    for run in (active, queued):
        error = executor.poll(run.id, 0).error
        assert error is not None
        assert error.code == "stopped"
    assert not executor.poll(queued.id, 0).points
    check_contract(artifacts, executor, chain(artifacts, "run-b1"))
    executor.close()


def test_runs_that_do_not_train_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    first_may_end = threading.Event()

    def record(call: StageCall, context: StageContext) -> None:
        started.append(call.stage_id)
        if call.stage_id == "first":
            assert first_may_end.wait(PATIENCE_SECONDS)

    monkeypatch.setattr(local_executor, "run_stage", record)
    executor = LocalExecutor(LocalArtifacts(tmp_path))
    kinds = {
        "first": StageKind.TRAIN,
        "second": StageKind.TRAIN_TRUNK,
        "third": StageKind.TRAIN_BRANCH,
        "export": StageKind.EXPORT,
        "evaluation": StageKind.EVALUATE,
    }
    for name, kind in kinds.items():
        executor.submit(Run(name, (StageCall(name, 1, kind, name, {}),)))
    until(lambda: started == ["first"])
    first_may_end.set()
    until(lambda: all(executor.poll(name, 0).state == RunState.SUCCEEDED for name in kinds))
    executor.close()
    assert started == ["first", "export", "evaluation", "second", "third"]


def test_a_run_whose_process_dies_is_lost_and_the_next_run_succeeds(tmp_path: Path) -> None:
    artifacts = LocalArtifacts(tmp_path)
    executor = LocalExecutor(artifacts, processes=2)
    lost = long_run(artifacts, "run-a1", seed=0)
    executor.submit(lost)
    until(lambda: bool(executor.poll(lost.id, 0).points))
    [child] = active_children()
    child.kill()
    until(lambda: executor.poll(lost.id, 0).state == RunState.LOST)
    check_contract(artifacts, executor, chain(artifacts, "run-b1"))
    executor.close()
    assert not active_children()


@pytest.mark.slow
@pytest.mark.ray
def test_the_ray_executor_passes_it_and_trains_the_same_bits(tmp_path: Path, ray_cluster) -> None:
    from workers.executors.ray_executor import RayExecutor

    local, remote = LocalArtifacts(tmp_path / "local"), LocalArtifacts(tmp_path / "remote")
    run = trained_in_process(local)
    over_ray = RayExecutor(remote, ray_cluster.dashboard_url)
    check_contract(remote, over_ray, chain(remote, f"run-{tmp_path.name}-a1"))
    for call in run.calls:
        assert weights(remote, call.key) == weights(local, call.key)


@pytest.mark.ray
@pytest.mark.slow
def test_closing_waits_for_a_training_run_to_leave_a_checkpoint_but_not_for_one_without_a_step(
    tmp_path: Path, ray_cluster
) -> None:
    from workers.executors.ray_executor import RayExecutor

    artifacts = LocalArtifacts(tmp_path)
    over_ray = RayExecutor(artifacts, ray_cluster.dashboard_url, ends_with_us=True)
    training, starting = (long_run(artifacts, f"run-{tmp_path.name}-{n}", seed=n) for n in range(2))
    patiently(lambda: over_ray.submit(training))
    until(lambda: bool(patiently(lambda: over_ray.poll(training.id, 0)).points))
    patiently(lambda: over_ray.submit(starting))
    start = time.monotonic()
    over_ray.close()
    assert time.monotonic() - start < DRAIN_SECONDS
    reports = [over_ray.poll(run.id, 0) for run in (training, starting)]
    for report in reports:
        assert report.state == RunState.FAILED
        assert report.error is not None
        assert report.error.code == "stopped"
    assert not reports[1].points
    stage = TrainStage.model_validate(training.calls[0].spec)
    assert artifacts.manifest(checkpoint_key(stage, reports[0].points[-1].step)) is not None


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_over_ray_train_like_one(tmp_path: Path, ray_cluster) -> None:
    from workers.executors.ray_executor import RayExecutor

    alone, together = LocalArtifacts(tmp_path / "alone"), LocalArtifacts(tmp_path / "together")
    run = trained_in_process(alone)
    over_ray = RayExecutor(together, ray_cluster.dashboard_url)
    check_contract(together, over_ray, chain(together, f"run-{tmp_path.name}-a1", workers=2))
    for call in run.calls:
        one, two = alone.manifest(call.key), together.manifest(call.key)
        assert one is not None
        assert two is not None
        assert two.result["devices"] == 2
        # The same rows, summed in another order.
        assert two.result["first_loss"] == pytest.approx(one.result["first_loss"], rel=1e-4)
        assert two.result["loss"] == pytest.approx(one.result["loss"], rel=1e-3)
