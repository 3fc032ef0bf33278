"""The driver of one training run, which Ray starts as a job.

    python -m workers.executors.ray_job <run id> <artifacts url>

The driver takes the run from the board and fits one TorchTrainer, whose loop trains the stages of the chain
one after another. Each stage publishes its own artifact, so Ray's checkpoints are not used and its storage
folder is deleted.
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
from workers.executors.failures import describe_failure
from workers.executors.run_board import NAMESPACE, board

logger = logging.getLogger(__name__)

REPORT_SECONDS = 0.5
BOARD_SECONDS = 30
# Leaves room for the stage host and serving replicas on the same GPU, but not for a second trainer.
TRAINER_GPUS = 0.6


def main(run_id: str, artifacts_url: str) -> None:
    """Fit the run. Raises the exception of the training loop, so that the job fails if the run does."""
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
    """Train every stage of the chain as one rank of the run."""
    from workers.stages import run_stage  # imports transformers, which the driver does not need
    from workers.stages.context import StageContext

    run: Run = config["run"]
    rank = ray.train.get_context().get_world_rank()
    channel = _ProgressChannel(run.id, rank)
    context = StageContext(
        artifacts=open_artifacts(config["artifacts_url"]),
        report=channel.report,
        should_stop=channel.should_stop,
    )
    run_board = board()
    try:
        for call in run.calls:
            try:
                run_stage(call, context)
            except Exception as error:
                channel.flush()
                ray.get(run_board.failed.remote(run.id, describe_failure(call.stage_id, error)))
                raise
            channel.flush()
            if rank == 0:
                ray.get(run_board.finished.remote(run.id, call.stage_id))
    finally:
        channel.close()


class _ProgressChannel:
    """Sends rank 0's points to the board twice a second, on its own thread, and learns when to stop."""

    def __init__(self, run_id: str, rank: int) -> None:
        self._run_id = run_id
        self._board = board()
        self._unsent: list[Point] = []
        self._lock = threading.Lock()
        self._stop = False
        self._closed = threading.Event()
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._send_periodically, daemon=True)
        if rank == 0:
            self._thread.start()

    def report(self, point: Point) -> None:
        with self._lock:
            self._unsent.append(point)

    def should_stop(self) -> bool:
        return self._stop

    def flush(self) -> None:
        """Send the unsent points. They are lost if the board is restarting, but the artifact has them all."""
        with self._sending:
            with self._lock:
                points, self._unsent = self._unsent, []
            try:
                self._stop |= ray.get(self._board.report.remote(self._run_id, points), timeout=BOARD_SECONDS)
            except ray.exceptions.RayError as error:
                logger.warning("the run board did not accept progress: %s", error)

    def close(self) -> None:
        self._closed.set()

    def _send_periodically(self) -> None:
        while not self._closed.is_set():
            time.sleep(REPORT_SECONDS)
            self.flush()


def _scaling(run: Run) -> ScalingConfig:
    """Per worker: a share of a GPU on CUDA; on CPUs, a share of the host's ``trainer`` resource, if any."""
    if run.calls[0].spec["line"]["numerics"]["device"] == "cuda":
        return ScalingConfig(
            num_workers=run.workers, use_gpu=True, resources_per_worker={"CPU": 1, "GPU": TRAINER_GPUS}
        )
    resources = {"CPU": 1.0}
    if ray.cluster_resources().get("trainer"):
        # Ray counts resources in ten-thousandths. Rounding down lets all workers of a run fit on one host.
        resources["trainer"] = int(10_000 / run.workers) / 10_000
    return ScalingConfig(num_workers=run.workers, resources_per_worker=resources)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
