"""Poll the runs of held stages, and record progress, results and failures under the epoch of the claim."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy.orm import Session

from service.artifacts import Artifacts
from service.core.artifact_files import METRICS
from service.core.errors import ArtifactCorrupt, Unavailable, WorkerLost
from service.core.executor import Executor, Point, RunError, RunReport, RunState
from service.core.manifest import Manifest
from service.core.plan import checkpoint_key, checkpoint_prefix, checkpoint_step
from service.core.stage_specs import TRAINING_KINDS, TrainStage
from service.orchestrator import advance, repair
from service.orchestrator.leases import Lease, LeaseTable
from service.store import metrics, stages
from service.store.database import Database

logger = logging.getLogger(__name__)


def collect(database: Database, artifacts: Artifacts, executor: Executor, leases: LeaseTable) -> bool:
    """Poll every run once. Returns whether a stage ended."""
    if leases.renewal_is_due():
        _renew(database, leases)
    moved = False
    for run_id, members in leases.by_run().items():
        try:
            report = executor.poll(run_id, leases.cursors.get(run_id, 0))
        except Unavailable as error:
            logger.warning("run %s: %s", run_id, error.detail)
            continue
        _record_progress(database, leases, members, report)
        leases.set_cursor(run_id, report.cursor)
        has_ended = report.state != RunState.RUNNING
        for lease in members:
            if lease.stage_id in report.finished or has_ended:
                _settle(database, artifacts, leases, lease, report)
                moved = True
        if report.state == RunState.LOST:
            # A slow orchestrator may have submitted the run since this poll; dispatch checks the claim after it
            # submits.
            executor.cancel(run_id)
    return moved


def _renew(database: Database, leases: LeaseTable) -> None:
    with database.transaction() as session:
        lost = stages.renew(session, leases.epochs(), leases.lease_seconds)
    leases.set_renewed()
    for stage_id in lost:  # cancelled, and rescue ends its run; or taken over, and its new holder polls it
        leases.drop(stage_id)


def _record_progress(
    database: Database, leases: LeaseTable, members: Sequence[Lease], report: RunReport
) -> None:
    for lease in members:
        points = [point for point in report.points if point.stage_id == lease.stage_id]
        if points:
            lease.first_step = lease.first_step or points[0].stage_step
            with _guarded(database, leases, lease) as session:
                progress = _progress(points[-1], lease.first_step)
                stages.guarded_update(session, lease.stage_id, lease.epoch, progress=progress)
                metrics.record_points(session, lease.stage_id, [point.as_row() for point in points])


def _progress(last: Point, first_step: int) -> dict[str, object]:
    return {
        "first_step": first_step,
        "step": last.stage_step,
        "total_steps": last.total_steps,
        "loss": last.loss,
        "learning_rate": last.learning_rate,
        "tokens_per_second": last.tokens_per_second,
        "eta_seconds": last.eta_seconds,
    }


def _settle(
    database: Database, artifacts: Artifacts, leases: LeaseTable, lease: Lease, report: RunReport
) -> None:
    """Record the end of a stage's part of its run: it has published its artifact, or it has failed."""
    assert lease.key is not None
    error = report.error
    try:
        manifest = artifacts.manifest(lease.key)
    except ArtifactCorrupt as corrupt:
        # Unpublish it, because it is useless and would block the next attempt's artifact.
        artifacts.unpublish([lease.key])
        manifest, error = None, RunError(lease.stage_id, corrupt.code, corrupt.detail, retryable=True)
    if manifest is not None:
        _settle_success(database, artifacts, leases, lease, manifest)
    else:
        error = error or RunError(
            lease.stage_id, WorkerLost.code, f"run {lease.run_id} is gone ({report.state})", retryable=True
        )
        _settle_failure(database, artifacts, leases, lease, error)
    leases.drop(lease.stage_id)


def _settle_success(
    database: Database, artifacts: Artifacts, leases: LeaseTable, lease: Lease, manifest: Manifest
) -> None:
    points = _published_points(artifacts, manifest) if lease.kind in TRAINING_KINDS else []
    with _guarded(database, leases, lease) as session:
        metrics.record_points(session, lease.stage_id, points)
        advance.succeed(session, lease.stage_id, lease.epoch, manifest)


def _settle_failure(
    database: Database, artifacts: Artifacts, leases: LeaseTable, lease: Lease, error: RunError
) -> None:
    logger.warning("stage %s failed: %s", lease.stage_id, error.detail)
    makers = []
    if error.code in repair.DAMAGE_CODES and error.stage_id == lease.stage_id:
        makers = repair.unpublish_damaged_inputs(database, artifacts, lease.stage_id)
    advanced = error.code == WorkerLost.code and _has_advanced(database, artifacts, lease)
    with _guarded(database, leases, lease) as session:
        repaired = makers and repair.rerun_makers(session, lease.stage_id, lease.epoch, makers, error)
        if not repaired:
            advance.fail_attempt(session, lease.stage_id, lease.epoch, error, advanced=advanced)


def _has_advanced(database: Database, artifacts: Artifacts, lease: Lease) -> bool:
    """Whether the attempt published a checkpoint past its start, from which the next one can continue."""
    if lease.first_step is None:
        return False
    with database.reading() as session:
        spec = TrainStage.model_validate(stages.get(session, lease.stage_id).spec)
    published = artifacts.keys(checkpoint_prefix(spec))
    steps = range(spec.from_step + lease.first_step, spec.to_step)
    return any(
        checkpoint_step(key) in steps and checkpoint_key(spec, checkpoint_step(key)) == key
        for key in published
    )


def _published_points(artifacts: Artifacts, manifest: Manifest) -> list[dict[str, object]]:
    """The metric points in the artifact.

    They are complete; live points may have been lost.
    """
    lines = artifacts.path(manifest, METRICS).read_text().splitlines()
    return [json.loads(line) for line in lines if line]


@contextmanager
def _guarded(database: Database, leases: LeaseTable, lease: Lease) -> Iterator[Session]:
    """A transaction for guarded writes. If one is fenced, nothing is written and the lease is dropped."""
    try:
        with database.transaction() as session:
            yield session
    except stages.Fenced:
        logger.info("stage %s is no longer held under epoch %d", lease.stage_id, lease.epoch)
        leases.drop(lease.stage_id)
