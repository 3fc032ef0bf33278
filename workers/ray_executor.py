"""The executor port over Ray: training as Ray Jobs under deterministic ids, everything else on one warm detached actor.

A job outlives the orchestrator that submitted it, and so do the run board and the stage host, so a restarted orchestrator
adopts what runs by its name. Where the whole cluster is gone, poll says LOST and the orchestrator submits again.
"""

import hashlib
import logging
import shlex
import sys
import time
from functools import cached_property
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RaySystemError
from ray.job_submission import JobStatus, JobSubmissionClient

from service.artifacts import Artifacts, open_artifacts
from service.core.errors import Unavailable
from service.core.executor import Capabilities, Run, RunError, RunReport, RunState
from service.core.stage_specs import TRAINING_KINDS
from service.core.stopping import DRAIN_SECONDS
from workers.run_board import NAMESPACE, board

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
POLL_SECONDS = 0.2
# One GPU must hold a trainer, the stage host and serving replicas together, but never two trainers.
HOST_GPUS = 0.1

_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
# A lost node costs an attempt that resumes from our own checkpoint, so Ray's watcher for announced losses is a process
# more that every run would start and never needs.
_JOB_ENVIRONMENT = _ENVIRONMENT | {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}

_UNDER_WAY = {JobStatus.PENDING, JobStatus.RUNNING}
_FINAL = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}


class StageHost:
    """Runs every stage that is not training, in one process that has imported torch and stays warm.

    torch is imported here and not at the top: the orchestrator, which imports this module, has no use for it.
    """

    def __init__(self, artifacts_url: str) -> None:
        from workers.local_executor import LocalExecutor

        self._executor = LocalExecutor(open_artifacts(artifacts_url))

    def capabilities(self) -> Capabilities:
        return self._executor.capabilities(1)

    def submit(self, run: Run) -> None:
        self._executor.submit(run)

    def poll(self, run_id: str, cursor: int) -> RunReport:
        return self._executor.poll(run_id, cursor)

    def cancel(self, run_id: str) -> None:
        self._executor.cancel(run_id)

    def stop_all(self) -> None:
        self._executor.stop_all()


def host_name(artifacts_url: str) -> str:
    """Name of the stage host: services with artifacts of their own may share a cluster, and each finds its own host."""
    return f"pathswitch-stage-host-{hashlib.sha256(artifacts_url.encode()).hexdigest()[:12]}"


class RayExecutor:
    """Submits to the cluster that this process is connected to (``ray.init`` was called) and whose Jobs API is at ``jobs_url``.

    ``ends_with_us``: whoever runs the cluster ends it when this process has ended.
    """

    def __init__(
        self, artifacts: Artifacts, jobs_url: str, python: str = sys.executable, *, ends_with_us: bool = False
    ) -> None:
        self._artifacts = artifacts
        self._python = python
        self._ends_with_us = ends_with_us
        self._jobs = JobSubmissionClient(jobs_url)
        self._training: set[str] = set()
        _ = self._host  # it takes seconds to import torch: let it begin before the first update asks for it

    def capabilities(self, workers: int) -> Capabilities:
        if ray.cluster_resources().get("GPU"):
            remote = ray.remote(num_gpus=HOST_GPUS, num_cpus=1)(_measure_capabilities)
            return _answer(remote.remote(workers), seconds=120)  # type: ignore[no-any-return]
        measured: Capabilities = _answer(self._host.capabilities.remote(), seconds=120)
        return Capabilities(measured.device, measured.bf16, max(1, measured.threads // workers))

    def submit(self, run: Run) -> None:
        if run.calls[0].kind in TRAINING_KINDS:
            self._training.add(run.id)
            self._submit_job(run)
        else:
            _answer(self._host.submit.remote(run))

    def poll(self, run_id: str, cursor: int) -> RunReport:
        if run_id not in self._training:
            report: RunReport = _answer(self._host.poll.remote(run_id, cursor))
            if report.state != RunState.LOST:
                return report
        return self._poll_job(run_id, cursor)

    def cancel(self, run_id: str) -> None:
        _answer(self._board.stop.remote(run_id))
        if run_id not in self._training:
            _answer(self._host.cancel.remote(run_id))
        if self._job_status(run_id) in _UNDER_WAY:
            self._jobs.stop_job(run_id)

    def close(self) -> None:
        """What runs belongs to the cluster and goes on. Where that is about to end, training leaves its checkpoints first."""
        if not self._ends_with_us:
            return
        deadline = time.monotonic() + DRAIN_SECONDS
        try:
            host = self._host.stop_all.remote()
            for run_id in _answer(self._board.stop_all.remote()):
                if self._job_status(run_id) in _UNDER_WAY:
                    self._jobs.stop_job(run_id)
            while self._any_under_way() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            _answer(host, max(0.0, deadline - time.monotonic()))
        except (Unavailable, RuntimeError, OSError) as error:
            logger.warning("what runs may not have stopped: %s", error)

    def _any_under_way(self) -> bool:
        # Whatever is connected is in the list too, this process among it, but has not been submitted.
        return any(job.submission_id and job.status in _UNDER_WAY for job in self._jobs.list_jobs())

    @cached_property
    def _board(self) -> Any:
        return board()

    @cached_property
    def _host(self) -> Any:
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_concurrency=4)(StageHost)
        gpus = HOST_GPUS if ray.cluster_resources().get("GPU") else 0
        return actor.options(
            name=host_name(self._artifacts.url),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_gpus=gpus,
            runtime_env={"env_vars": _ENVIRONMENT},
        ).remote(self._artifacts.url)

    def _submit_job(self, run: Run) -> None:
        _answer(self._board.put.remote(run))
        try:
            self._jobs.submit_job(
                submission_id=run.id,
                entrypoint=shlex.join([self._python, "-m", "workers.ray_job", run.id, self._artifacts.url]),
                runtime_env={"env_vars": _JOB_ENVIRONMENT},
            )
        except (RuntimeError, ConnectionError, OSError) as error:
            # A duplicate id is answered with an error: whoever submitted it first, it is the run we want.
            if self._job_status(run.id) is None:
                raise Unavailable(f"the Jobs API refused {run.id}: {error}") from error
            logger.info("adopted run %s", run.id)

    def _poll_job(self, run_id: str, cursor: int) -> RunReport:
        seen = _answer(self._board.look.remote(run_id, cursor))
        status = self._job_status(run_id)
        if status is None:
            return RunReport(state=RunState.LOST, cursor=cursor)
        if status in _FINAL:
            seen = _answer(
                self._board.look.remote(run_id, cursor)
            )  # what it said last, now that it says no more
        known = seen or {"cursor": cursor, "error": None}
        error: RunError | None = known.pop("error")
        if status not in _FINAL:
            return RunReport(state=RunState.RUNNING, **known)
        self._training.discard(run_id)
        state = RunState.SUCCEEDED if status == JobStatus.SUCCEEDED and error is None else RunState.FAILED
        return RunReport(state=state, error=error, **known)

    def _job_status(self, run_id: str) -> JobStatus | None:
        """The job's status, or None where the cluster knows no such job. Raises Unavailable where it does not answer."""
        try:
            return self._jobs.get_job_status(run_id)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return None
            raise Unavailable(f"the Jobs API does not answer: {error}") from error
        except (ConnectionError, OSError) as error:
            raise Unavailable(f"the Jobs API does not answer: {error}") from error


def _measure_capabilities(workers: int) -> Capabilities:
    from workers.capabilities import measure_capabilities

    return measure_capabilities(workers)


def _answer(reference: Any, seconds: float = ANSWER_SECONDS) -> Any:
    """What an actor answers. Raises Unavailable where it does not in time, or is starting again."""
    try:
        return ray.get(reference, timeout=seconds)
    except (GetTimeoutError, RayActorError, RaySystemError) as error:
        raise Unavailable(f"Ray does not answer: {error}") from error
