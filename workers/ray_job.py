"""The driver of one training run, started as a Ray Job: ``python -m workers.ray_job <run id> <artifacts url>``.

It takes the run from the board and fits one TorchTrainer whose loop trains the stages of the chain one after another, each
publishing its own artifact. A new run name per attempt keeps Ray's own snapshots out of the way: what counts is ours.
"""

import logging
import shutil
import sys
import threading
import time
from typing import Any

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from service.artifacts import open_artifacts
from service.core.executor import Point, Run
from workers.failures import describe_failure
from workers.run_board import NAMESPACE, board

logger = logging.getLogger(__name__)

REPORT_SECONDS = 0.5
TRAINER_GPUS = 0.6  # beside the stage host and serving replicas on the same GPU; never two trainers


def main(run_id: str, artifacts_url: str) -> None:
    """Fit the run. Raises what the training loop raised, so that the job fails when the run does."""
    ray.init(namespace=NAMESPACE)
    run: Run = ray.get(board().run.remote(run_id))
    storage = open_artifacts(artifacts_url).root / ".ray-train"
    try:
        TorchTrainer(
            train_chain,
            train_loop_config={"run": run, "artifacts_url": artifacts_url},
            scaling_config=_scaling(run),
            run_config=RunConfig(name=run.id, storage_path=str(storage)),
        ).fit()
    finally:
        shutil.rmtree(storage / run.id, ignore_errors=True)


def train_chain(config: dict[str, Any]) -> None:
    """One rank of a training run: every stage of the chain in turn."""
    from workers.stages import run_stage
    from workers.stages.context import StageContext

    run: Run = config["run"]
    rank = ray.train.get_context().get_world_rank()
    wire = _Wire(run.id, rank)
    context = StageContext(
        artifacts=open_artifacts(config["artifacts_url"]),
        report=wire.report,
        should_stop=wire.should_stop,
    )
    handle = board()
    try:
        for call in run.calls:
            try:
                run_stage(call, context)
            except Exception as error:
                wire.flush()
                ray.get(handle.failed.remote(run.id, describe_failure(call.stage_id, error)))
                raise
            wire.flush()
            if rank == 0:
                ray.get(handle.finished.remote(run.id, call.stage_id))
    finally:
        wire.close()


class _Wire:
    """Sends rank 0's points to the board twice a second and brings back whether to stop, off the training thread."""

    def __init__(self, run_id: str, rank: int) -> None:
        self._run_id = run_id
        self._board = board()
        self._points: list[Point] = []
        self._lock = threading.Lock()
        self._stop = False
        self._closed = threading.Event()
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._send_regularly, daemon=True)
        if rank == 0:
            self._thread.start()

    def report(self, point: Point) -> None:
        with self._lock:
            self._points.append(point)

    def should_stop(self) -> bool:
        return self._stop

    def flush(self) -> None:
        """Send what waits. The board may be restarting: then the points come with the artifact."""
        with self._sending:
            with self._lock:
                points, self._points = self._points, []
            try:
                self._stop |= ray.get(self._board.report.remote(self._run_id, points), timeout=30)
            except ray.exceptions.RayError as error:
                logger.warning("the run board does not answer: %s", error)

    def close(self) -> None:
        self._closed.set()

    def _send_regularly(self) -> None:
        while not self._closed.is_set():
            time.sleep(REPORT_SECONDS)
            self.flush()


def _scaling(run: Run) -> ScalingConfig:
    """One GPU share per worker where the line trains on CUDA; on CPUs a share of the host's ``trainer`` where it has one."""
    if run.calls[0].spec["line"]["numerics"]["device"] == "cuda":
        return ScalingConfig(
            num_workers=run.workers, use_gpu=True, resources_per_worker={"CPU": 1, "GPU": TRAINER_GPUS}
        )
    resources = {"CPU": 1.0}
    if ray.cluster_resources().get("trainer"):
        # Ray counts resources in ten-thousandths: round down, so that the shares of one run fit one host.
        resources["trainer"] = int(10_000 / run.workers) / 10_000
    return ScalingConfig(num_workers=run.workers, resources_per_worker=resources)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
