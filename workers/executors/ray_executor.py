"""The executor port over Ray: each training run is a Ray job, and all other stages run in one detached actor.

Jobs have deterministic ids and actors have names. Both outlive the orchestrator, and a restarted one adopts
them. If the whole cluster is gone, ``poll`` reports LOST and the orchestrator submits the run again.
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
from workers.executors.run_board import NAMESPACE, board

logger = logging.getLogger(__name__)

ACTOR_SECONDS = 10.0
CAPABILITIES_SECONDS = 120.0
POLL_SECONDS = 0.2
# A GPU must hold a trainer, the stage host and serving replicas together, but never two trainers.
HOST_GPUS = 0.1

_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
# Ray's preemption watcher would be one more process per run. We do not need it, because after a node is lost
# the next attempt resumes from our own checkpoint.
_JOB_ENVIRONMENT = _ENVIRONMENT | {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}

_ACTIVE = {JobStatus.PENDING, JobStatus.RUNNING}
_FINAL = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}


class StageHost:
    """Runs all stages that do not train, in one long-lived process that has imported torch.

    The import is inside ``__init__``, because the orchestrator imports this module and does not need torch. A
    host that 0.2 started may serve this release's orchestrator, so method names stay until 0.4.
    """

    def __init__(self, artifacts_url: str) -> None:
        from workers.executors.local_executor import LocalExecutor

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
    """Name of the stage host. Services with different artifact stores may share a cluster."""
    return f"pathswitch-stage-host-{hashlib.sha256(artifacts_url.encode()).hexdigest()[:12]}"


class RayExecutor:
    """Runs stages on the cluster that this process is connected to (``ray.init``).

    ``jobs_url`` is the address of its Jobs API. With ``ends_with_us`` the cluster ends soon after this
    process, so ``close`` stops all runs first.
    """

    def __init__(
        self, artifacts: Artifacts, jobs_url: str, python: str = sys.executable, *, ends_with_us: bool = False
    ) -> None:
        self._artifacts = artifacts
        self._python = python
        self._ends_with_us = ends_with_us
        self._jobs = JobSubmissionClient(jobs_url)
        self._training: set[str] = set()
        _ = self._host  # importing torch takes seconds: start the host before the first update needs it

    def capabilities(self, workers: int) -> Capabilities:
        if ray.cluster_resources().get("GPU"):
            remote = ray.remote(num_gpus=HOST_GPUS, num_cpus=1)(_measure_capabilities)
            return _get(remote.remote(workers), CAPABILITIES_SECONDS)  # type: ignore[no-any-return]
        measured: Capabilities = _get(self._host.capabilities.remote(), CAPABILITIES_SECONDS)
        return Capabilities(measured.device, measured.bf16, max(1, measured.threads // workers))

    def submit(self, run: Run) -> None:
        if run.calls[0].kind in TRAINING_KINDS:
            self._training.add(run.id)
            self._submit_job(run)
        else:
            _get(self._host.submit.remote(run))

    def poll(self, run_id: str, cursor: int) -> RunReport:
        if run_id not in self._training:
            report: RunReport = _get(self._host.poll.remote(run_id, cursor))
            if report.state != RunState.LOST:
                return report
        return self._poll_job(run_id, cursor)

    def cancel(self, run_id: str) -> None:
        _get(self._board.stop.remote(run_id))
        if run_id not in self._training:
            _get(self._host.cancel.remote(run_id))
        if self._job_status(run_id) in _ACTIVE:
            self._jobs.stop_job(run_id)

    def close(self) -> None:
        """Leave the runs to a cluster that stays. In one that ends with us, stop them at a checkpoint."""
        if not self._ends_with_us:
            return
        deadline = time.monotonic() + DRAIN_SECONDS
        try:
            host_stopped = self._host.stop_all.remote()
            for run_id in _get(self._board.stop_all.remote()):
                if self._job_status(run_id) in _ACTIVE:
                    self._jobs.stop_job(run_id)
            while self._any_job_active() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            _get(host_stopped, max(0.0, deadline - time.monotonic()))
        except (Unavailable, RuntimeError, OSError) as error:
            logger.warning("some runs may not have stopped: %s", error)

    def _any_job_active(self) -> bool:
        # The list also holds connected drivers, such as this process, which have no submission id.
        return any(job.submission_id and job.status in _ACTIVE for job in self._jobs.list_jobs())

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
        _get(self._board.put.remote(run))
        entrypoint = [self._python, "-m", "workers.executors.ray_job", run.id, self._artifacts.url]
        try:
            self._jobs.submit_job(
                submission_id=run.id,
                entrypoint=shlex.join(entrypoint),
                runtime_env={"env_vars": _JOB_ENVIRONMENT},
            )
        except (RuntimeError, ConnectionError, OSError) as error:
            # Ray refuses a duplicate id. A job with this id is the run we want, so adopt it.
            if self._job_status(run.id) is None:
                raise Unavailable(f"the Jobs API refused {run.id}: {error}") from error
            logger.info("adopted run %s", run.id)

    def _poll_job(self, run_id: str, cursor: int) -> RunReport:
        progress = _get(self._board.look.remote(run_id, cursor))
        status = self._job_status(run_id)
        if status is None:
            return RunReport(state=RunState.LOST, cursor=cursor)
        if status in _FINAL:
            # Look again: the job may have reported more between the two calls above.
            progress = _get(self._board.look.remote(run_id, cursor))
        fields = progress or {"cursor": cursor, "error": None}
        error: RunError | None = fields.pop("error")
        if status not in _FINAL:
            return RunReport(state=RunState.RUNNING, **fields)
        self._training.discard(run_id)
        state = RunState.SUCCEEDED if status == JobStatus.SUCCEEDED and error is None else RunState.FAILED
        return RunReport(state=state, error=error, **fields)

    def _job_status(self, run_id: str) -> JobStatus | None:
        """Return the job's status, or None if the cluster does not know the job. Raises Unavailable."""
        try:
            return self._jobs.get_job_status(run_id)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return None
            raise Unavailable(f"the Jobs API is not responding: {error}") from error
        except (ConnectionError, OSError) as error:
            raise Unavailable(f"the Jobs API is not responding: {error}") from error


def _measure_capabilities(workers: int) -> Capabilities:
    from workers.executors.capabilities import measure_capabilities  # imports torch

    return measure_capabilities(workers)


def _get(reference: Any, seconds: float = ACTOR_SECONDS) -> Any:
    """Wait for an actor's answer. Raises Unavailable on a timeout and while the actor restarts."""
    try:
        return ray.get(reference, timeout=seconds)
    except (GetTimeoutError, RayActorError, RaySystemError) as error:
        raise Unavailable(f"Ray is not responding: {error}") from error
