"""Serving, level by level: what rows say should be served is desired, what replicas report is observed."""

import logging
from dataclasses import dataclass
from datetime import datetime

from service.core import rollout
from service.core.executor import RunError
from service.core.rollout import Move, Pending, Step
from service.core.serving import ServedTarget, ServedVersion, Serving
from service.core.stage_specs import StageKind
from service.core.states import ReleaseState
from service.orchestrator import advance
from service.store import models, observations, releases, stages
from service.store.database import Database, now
from service.store.tables import Release

logger = logging.getLogger(__name__)

MOST_STEPS = 4  # of a release: begun, tried, promoted, live
OBSERVE_SECONDS = 5.0  # how old may be what is known of replicas that nothing is being asked of


@dataclass(frozen=True)
class Line:
    """What a model line should answer with, what is on its way, and when its replicas were asked last."""

    model_id: str
    target: ServedTarget
    pending: Pending | None
    observed_at: datetime | None


def reconcile(database: Database, serving: Serving) -> bool:
    """Make desired what should be served, write down what is, and let the release stages that waited for it end."""
    moved = False
    for _ in range(MOST_STEPS):
        if not _advance(database, serving):
            break
        moved = True  # and what has changed is made desired at once
    return _end_release_stages(database) or moved


def _advance(database: Database, serving: Serving) -> bool:
    lines, at = lines_of(database)
    serving.apply([line.target for line in lines])
    asked = [line for line in lines if line.pending is not None or _is_old(line, at)]
    observed = serving.observe([line.target.model for line in asked]) if asked else {}
    moved = False
    for line in asked:
        reports = list(observed.get(line.target.model, ()))
        pending = line.pending
        if pending is not None and (move := rollout.next_move(pending, line.target, reports, at)):
            moved |= _carry_out(database, line, pending, move)
        if _is_old(line, at):
            with database.transaction() as session:
                models.model(session, line.target.model, lock=True)
                observations.put(session, line.model_id, reports)
    return moved


def lines_of(database: Database) -> tuple[list[Line], datetime]:
    """What every model should answer with, and what time it is."""
    with database.reading() as session:
        seen = observations.times(session)
        lines = []
        for model in models.all_models(session):
            spec = models.serving_spec(model)
            asked, live = releases.pending(session, model.id), releases.live(session, model.id)
            ended = releases.ended(session, model.id, spec.keep)
            ids = {row.model_version_id for row in (asked, live) if row is not None} | set(ended)
            rows = models.versions_by_ids(session, ids) if ids else {}
            version = {id: ServedVersion(row.number, row.export_key) for id, row in rows.items()}
            pending = None
            if asked is not None:
                pending = _pending(asked, version[asked.model_version_id], first=live is None)
            target = rollout.target(
                model.name,
                spec,
                releases.decisions(session, model.id),
                live=None if live is None else version[live.model_version_id],
                pending=pending,
                earlier=[version[id] for id in ended],
            )
            lines.append(Line(model.id, target, pending, seen.get(model.id)))
        return lines, now(session)


def _pending(row: Release, version: ServedVersion, *, first: bool) -> Pending:
    spec = None if row.rollout is None else rollout.ROLLOUT.validate_python(row.rollout)
    tried_as = spec if spec is not None and spec.strategy in ("canary", "shadow") else None
    return Pending(row.id, version, first, tried_as, row.begun_at, row.tried_at, row.promoted_at)


def _is_old(line: Line, at: datetime) -> bool:
    if line.target.stable is None:
        return False
    return line.observed_at is None or (at - line.observed_at).total_seconds() > OBSERVE_SECONDS


def _carry_out(database: Database, line: Line, pending: Pending, move: Move) -> bool:
    name, number = line.target.model, pending.version.number
    with database.transaction() as session:
        model = models.model(session, name, lock=True)
        row = releases.get(session, pending.release_id)
        if row.state != ReleaseState.PENDING:
            return False
        if move.trial is not None:
            row.trial = move.trial
        match move.step:
            case Step.BEGIN:
                row.begun_at = row.begun_at or now(session)
            case Step.TRY:
                row.tried_at = row.tried_at or now(session)
            case Step.PROMOTE:
                releases.promote(session, model, row)
            case Step.GO_LIVE:
                releases.go_live(session, model, row)
            case Step.FAIL:
                releases.fail(session, model, row, move.error or "")
    if move.step == Step.FAIL:
        logger.warning("%s@%d is not released: %s", name, number, move.error)
    elif move.step == Step.GO_LIVE:
        logger.info("%s@%d is served", name, number)
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
