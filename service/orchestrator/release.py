"""Level-triggered serving: tell replicas what the rows say should be served, and record what they report."""

import logging
from dataclasses import dataclass
from datetime import datetime

from service.core import rollout
from service.core.executor import RunError
from service.core.rollout import Action, Decision, PendingRelease
from service.core.serving import ServedTarget, ServedVersion, Serving
from service.core.stage_specs import StageKind
from service.core.states import ReleaseState
from service.orchestrator import advance
from service.store import models, observations, releases, stages
from service.store.database import Database, now
from service.store.tables import Release

logger = logging.getLogger(__name__)

MAX_ACTIONS = 4  # the actions of one release: begin, try, promote, go live
OBSERVE_SECONDS = 5.0  # interval between observations of lines without a pending release


@dataclass(frozen=True)
class ServedLine:
    """What a model line should serve, its pending release, and when its replicas were last observed."""

    model_id: str
    target: ServedTarget
    pending: PendingRelease | None
    observed_at: datetime | None


def reconcile(database: Database, serving: Serving) -> bool:
    """Apply what should be served, record what is, and end the release stages whose release has ended.

    Returns whether any row moved.
    """
    moved = False
    for _ in range(MAX_ACTIONS):
        if not _advance(database, serving):
            break
        moved = True  # apply the change at once, rather than at the next tick
    return _end_release_stages(database) or moved


def _advance(database: Database, serving: Serving) -> bool:
    lines, at = lines_of(database)
    serving.apply([line.target for line in lines])
    due = [line for line in lines if line.pending is not None or _is_stale(line, at)]
    observed = serving.observe([line.target.model for line in due]) if due else {}
    moved = False
    for line in due:
        reports = list(observed.get(line.target.model, ()))
        pending = line.pending
        if pending is not None and (decision := rollout.next_action(pending, line.target, reports, at)):
            moved |= _carry_out(database, line, pending, decision)
        if _is_stale(line, at):
            with database.transaction() as session:
                models.model(session, line.target.model, lock=True)
                observations.put(session, line.model_id, reports)
    return moved


def lines_of(database: Database) -> tuple[list[ServedLine], datetime]:
    """What every model line should serve, and the database's time."""
    with database.reading() as session:
        observed_at = observations.times(session)
        lines = []
        for model in models.all_models(session):
            spec = models.serving_spec(model)
            requested, live = releases.pending(session, model.id), releases.live(session, model.id)
            ended = releases.ended(session, model.id, spec.keep)
            ids = {row.model_version_id for row in (requested, live) if row is not None} | set(ended)
            rows = models.versions_by_ids(session, ids) if ids else {}
            version = {id: ServedVersion(row.number, row.export_key) for id, row in rows.items()}
            pending = None
            if requested is not None:
                served = version[requested.model_version_id]
                pending = _pending_release(requested, served, is_first=live is None)
            target = rollout.served_target(
                model.name,
                spec,
                releases.decisions(session, model.id),
                live=None if live is None else version[live.model_version_id],
                pending=pending,
                earlier=[version[id] for id in ended],
            )
            lines.append(ServedLine(model.id, target, pending, observed_at.get(model.id)))
        return lines, now(session)


def _pending_release(row: Release, version: ServedVersion, *, is_first: bool) -> PendingRelease:
    spec = None if row.rollout is None else rollout.ROLLOUT.validate_python(row.rollout)
    trial_spec = spec if spec is not None and spec.strategy in ("canary", "shadow") else None
    return PendingRelease(row.id, version, is_first, trial_spec, row.begun_at, row.tried_at, row.promoted_at)


def _is_stale(line: ServedLine, at: datetime) -> bool:
    if line.target.stable is None:
        return False
    return line.observed_at is None or (at - line.observed_at).total_seconds() > OBSERVE_SECONDS


def _carry_out(database: Database, line: ServedLine, pending: PendingRelease, decision: Decision) -> bool:
    name, number = line.target.model, pending.version.number
    with database.transaction() as session:
        model = models.model(session, name, lock=True)
        row = releases.get(session, pending.release_id)
        if row.state != ReleaseState.PENDING:
            return False
        if decision.trial is not None:
            row.trial = decision.trial
        match decision.action:
            case Action.BEGIN:
                row.begun_at = row.begun_at or now(session)
            case Action.TRY:
                row.tried_at = row.tried_at or now(session)
            case Action.PROMOTE:
                releases.promote(session, model, row)
            case Action.GO_LIVE:
                releases.go_live(session, model, row)
            case Action.FAIL:
                releases.fail(session, model, row, decision.error or "")
    if decision.action == Action.FAIL:
        logger.warning("%s@%d is not released: %s", name, number, decision.error)
    elif decision.action == Action.GO_LIVE:
        logger.info("%s@%d is served", name, number)
    return True


def _end_release_stages(database: Database) -> bool:
    """End the release stages whose release has ended.

    They wait for its row, not for a run, so any orchestrator may do it.
    """
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
                    advance.succeed_decision(
                        session, stage_id, epoch, {"release": row.id, "state": row.state}
                    )
        except stages.Fenced:
            logger.info("release stage %s is no longer held under epoch %d", stage_id, epoch)
    return bool(waiting)
