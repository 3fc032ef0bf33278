"""Serving, level by level: what rows say should be served is desired, what replicas answer with is observed."""

import logging

from service.core.executor import RunError
from service.core.serving import ReplicaReport, ServedTarget, Serving
from service.core.stage_specs import StageKind
from service.core.states import ReleaseState
from service.orchestrator import advance
from service.store import models, releases, stages
from service.store.database import Database

logger = logging.getLogger(__name__)


def reconcile(database: Database, serving: Serving) -> bool:
    """Make desired what should be served, write down what is, and let the release stages that waited for it end."""
    targets, asked = _targets(database)
    serving.apply(targets)
    moved = False
    if asked:
        observed = serving.observe()
        for model_name, (release_id, number) in asked.items():
            moved |= _record(database, model_name, release_id, number, list(observed.get(model_name, ())))
    return _end_release_stages(database) or moved


def _targets(database: Database) -> tuple[list[ServedTarget], dict[str, tuple[str, int]]]:
    """What every model should answer with, and the releases that are asked for and not seen everywhere yet."""
    targets, asked = [], {}
    with database.reading() as session:
        for model in models.all_models(session):
            pending = releases.pending(session, model.id)
            wanted = pending or releases.live(session, model.id)
            if wanted is None:
                targets.append(ServedTarget(model.name, None, None))
                continue
            version = models.version_by_id(session, wanted.model_version_id)
            sequence = releases.decisions(session, model.id)
            targets.append(ServedTarget(model.name, version.number, version.export_key, sequence))
            if pending is not None:
                asked[model.name] = (pending.id, version.number)
    return targets, asked


def _record(
    database: Database, model_name: str, release_id: str, number: int, reports: list[ReplicaReport]
) -> bool:
    answering = bool(reports) and all(report.number == number for report in reports)
    errors = [report.error for report in reports if report.failed_number == number and report.error]
    if not answering and not errors:
        return False
    with database.transaction() as session:
        model = models.model(session, model_name, lock=True)
        row = releases.get(session, release_id)
        if row.state != ReleaseState.PENDING:
            return False
        if answering:
            releases.go_live(session, model, row)
            logger.info("%s@%d is served", model_name, number)
        else:
            releases.fail(session, model, row, errors[0])
            logger.warning("%s@%d could not be served: %s", model_name, number, errors[0])
    return True


def _end_release_stages(database: Database) -> bool:
    """Release stages wait for their release's row, not for a run, so whoever sees the row end may end the stage."""
    with database.reading() as session:
        waiting = [
            (stage.id, stage.epoch, stage.progress["release"])
            for stage in stages.running_of_kind(session, StageKind.RELEASE)
            if stage.progress
            and releases.get(session, stage.progress["release"]).state != ReleaseState.PENDING
        ]
    for stage_id, epoch, release_id in waiting:
        try:
            with database.transaction() as session:
                row = releases.get(session, release_id)
                if row.state == ReleaseState.FAILED:
                    error = RunError(stage_id, "release_failed", row.error or "", retryable=False)
                    advance.fail_attempt(session, stage_id, epoch, error)
                else:
                    advance.decided(session, stage_id, epoch, {"release": row.id, "state": row.state})
        except stages.Fenced:
            logger.info("release stage %s is not held under epoch %d any more", stage_id, epoch)
    return bool(waiting)
