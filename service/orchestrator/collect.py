"""Poll the runs of what is held; write down progress, results and failures, each under the epoch that was claimed."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from sqlalchemy.orm import Session

from service.artifacts import Artifacts
from service.core.artifact_files import METRICS
from service.core.errors import ArtifactCorrupt, Unavailable, WorkerLost
from service.core.executor import Executor, Point, RunError, RunReport, RunState
from service.core.manifest import Manifest
from service.core.plan import checkpoint_key, checkpoint_prefix, checkpoint_step
from service.core.stage_specs import TRAINING_KINDS, TrainStage
from service.orchestrator import advance, repair
from service.orchestrator.leases import Held, Holding
from service.store import stages
from service.store.database import Database

logger = logging.getLogger(__name__)


def collect(database: Database, artifacts: Artifacts, executor: Executor, holding: Holding) -> bool:
    """Observe every run once. Returns whether a stage ended."""
    if holding.renewal_is_due():
        _renew(database, holding)
    moved = False
    for run_id, members in holding.by_run().items():
        try:
            report = executor.poll(run_id, holding.cursors.get(run_id, 0))
        except Unavailable as error:
            logger.warning("run %s: %s", run_id, error.detail)
            continue
        _record_progress(database, holding, members, report)
        holding.has_read(run_id, report.cursor)
        gone = report.state != RunState.RUNNING
        for held in members:
            if held.stage_id in report.finished or gone:
                _settle(database, artifacts, holding, held, report)
                moved = True
        if report.state == RunState.LOST:
            # Whoever had claimed it and was slow may have submitted it since we looked; dispatch looks after it submits.
            executor.cancel(run_id)
    return moved


def _renew(database: Database, holding: Holding) -> None:
    with database.transaction() as session:
        lost = stages.renew(
            session, {held.stage_id: held.epoch for held in holding.stages.values()}, holding.lease_seconds
        )
    holding.renewed()
    for stage_id in lost:  # cancelled (rescue ends its run) or taken over (its new holder polls it)
        holding.drop(stage_id)


def _record_progress(database: Database, holding: Holding, members: list[Held], report: RunReport) -> None:
    for held in members:
        points = [point for point in report.points if point.stage_id == held.stage_id]
        if points:
            held.first_step = held.first_step or points[0].stage_step
            _guarded(database, holding, held, partial(_write_progress, held, points))


def _write_progress(held: Held, points: list[Point], session: Session) -> None:
    last = points[-1]
    progress = {
        "first_step": held.first_step,
        "step": last.stage_step,
        "total_steps": last.total_steps,
        "loss": last.loss,
        "learning_rate": last.learning_rate,
        "tokens_per_second": last.tokens_per_second,
        "eta_seconds": last.eta_seconds,
    }
    stages.guarded_update(session, held.stage_id, held.epoch, progress=progress)
    stages.record_points(session, held.stage_id, [asdict(point) for point in points])


def _settle(
    database: Database, artifacts: Artifacts, holding: Holding, held: Held, report: RunReport
) -> None:
    """The stage's part of the run is over: it has published, or it has failed."""
    assert held.key is not None
    key = held.key
    error = report.error
    try:
        manifest = artifacts.manifest(key)
    except ArtifactCorrupt as corrupt:
        artifacts.unpublish([key])  # nobody can use it, and it is in the way of the next attempt's
        manifest, error = None, RunError(held.stage_id, corrupt.code, corrupt.detail, retryable=True)
    if manifest is not None:
        points = _settled_points(artifacts, manifest) if held.kind in TRAINING_KINDS else []

        def succeed(session: Session) -> None:
            stages.record_points(session, held.stage_id, points)
            advance.succeed(session, held.stage_id, held.epoch, manifest)

        _guarded(database, holding, held, succeed)
    else:
        failure = error or RunError(
            held.stage_id, WorkerLost.code, f"run {held.run_id} is gone ({report.state})", retryable=True
        )
        logger.warning("stage %s failed: %s", held.stage_id, failure.detail)
        damaged = []
        if failure.code in repair.DAMAGE_CODES and failure.stage_id == held.stage_id:
            damaged = repair.damaged_inputs(database, artifacts, held.stage_id)
        advanced = failure.code == WorkerLost.code and _has_advanced(database, artifacts, held)

        def fail(session: Session) -> None:
            healed = damaged and repair.make_again(session, held.stage_id, held.epoch, damaged, failure)
            if not healed:
                advance.fail_attempt(session, held.stage_id, held.epoch, failure, advanced=advanced)

        _guarded(database, holding, held, fail)
    holding.drop(held.stage_id)


def _has_advanced(database: Database, artifacts: Artifacts, held: Held) -> bool:
    """Whether the attempt has left a checkpoint beyond where it began: the next one need not repeat all of it."""
    if held.first_step is None:
        return False
    with database.reading() as session:
        spec = TrainStage.model_validate(stages.get(session, held.stage_id).spec)
    published = set(artifacts.keys(checkpoint_prefix(spec)))
    steps = range(spec.from_step + held.first_step, spec.to_step)
    return any(
        checkpoint_step(key) in steps and checkpoint_key(spec, checkpoint_step(key)) == key
        for key in published
    )


def _settled_points(artifacts: Artifacts, manifest: Manifest) -> list[dict[str, object]]:
    """The points as the artifact has them: complete, whatever of the live ones got lost on the way."""
    lines = artifacts.path(manifest, METRICS).read_text().splitlines()
    return [json.loads(line) for line in lines if line]


def _guarded(database: Database, holding: Holding, held: Held, write: Callable[[Session], None]) -> None:
    """Write under the held epoch; where it is not ours any more nothing is written and we let go of it."""
    try:
        with database.transaction() as session:
            write(session)
    except stages.Fenced:
        logger.info("stage %s is not held under epoch %d any more", held.stage_id, held.epoch)
        holding.drop(held.stage_id)
