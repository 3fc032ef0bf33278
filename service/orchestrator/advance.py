"""One result, one transaction: the end of a stage, the stages it makes ready, and the end of the update.

The caller holds the stage under ``epoch``. If it no longer does, these functions raise Fenced and write
nothing.
"""

from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core import retry
from service.core.errors import StageInputInvalid
from service.core.executor import RunError
from service.core.json_floats import replace_non_finite
from service.core.manifest import Manifest
from service.core.stage_specs import StageKind, TrainStage
from service.core.states import StageState, UpdateState
from service.orchestrator.versions import record_candidate
from service.planning.training_stages import write_training_stages
from service.store import datasets, events, models, stages, updates
from service.store.database import now
from service.store.tables import Checkpoint, Stage, Update


def succeed(session: Session, stage_id: str, epoch: int, manifest: Manifest) -> None:
    """Record that a held stage has published its artifact."""
    stage = stages.get(session, stage_id)
    run_id, wasted = stage.run_id, stage.wasted_seconds
    # The training of failed attempts up to the checkpoint from which this one continued was not wasted.
    earlier = manifest.result.get("carried_device_seconds", 0.0) / manifest.result.get("devices", 1)
    _set_succeeded(
        session,
        stage_id,
        epoch,
        replace_non_finite(manifest.result),
        wasted_seconds=max(0.0, wasted - earlier),
    )
    if run_id is not None:
        stages.start_next_of_run(session, run_id)
    _after_success(session, stages.get(session, stage_id), manifest)


def reuse(session: Session, stage_id: str, manifest: Manifest) -> bool:
    """Complete a ready stage at once, because its artifact already exists.

    Returns False if it is no longer ready.
    """
    row = session.execute(
        sa.update(Stage)
        .where(Stage.id == stage_id, Stage.state == StageState.READY)
        .values(
            state=StageState.SUCCEEDED,
            reused=True,
            epoch=Stage.epoch + 1,
            result=replace_non_finite(manifest.result),
            finished_at=now(session),
            ready_at=None,
        )
        .execution_options(synchronize_session=False)
    )
    if not row.rowcount:  # type: ignore[attr-defined]
        return False
    _after_success(session, stages.get(session, stage_id), manifest)
    return True


def succeed_decision(session: Session, stage_id: str, epoch: int, result: dict[str, Any]) -> None:
    """Record that a gate or release stage, which publishes nothing, has succeeded."""
    _set_succeeded(session, stage_id, epoch, result)
    _after_success(session, stages.get(session, stage_id), None)


def reject(session: Session, stage_id: str, epoch: int, result: dict[str, Any]) -> None:
    """Record that the gate rejected the candidate.

    The gate stage has succeeded, and the update ends as rejected.
    """
    _set_succeeded(session, stage_id, epoch, result)
    update = updates.update(session, stages.get(session, stage_id).update_id)
    updates.move(session, update, UpdateState.REJECTED)
    updates.cancel_open_stages(session, update.id)


def fail_attempt(
    session: Session, stage_id: str, epoch: int, error: RunError, *, advanced: bool = False
) -> None:
    """Record a failed attempt whose run has ended: the stage gets another attempt later, or the update fails.

    ``advanced`` attempts left a checkpoint from which the next attempt continues. A stage whose needs have
    not all succeeded was claimed together with them in one run and never started. It goes back to waiting,
    and the attempt does not count.
    """
    at = now(session)
    stage = stages.get(session, stage_id)
    if not stages.needs_succeeded(session, stage):
        stages.guarded_update(
            session,
            stage_id,
            epoch,
            state=StageState.PENDING,
            attempt=Stage.attempt - 1,
            **stages.RELEASED_CLAIM,
        )
        return
    error_document, wasted_seconds = stages.lost_attempt(stage, error, at)
    follow_up = retry.after_failure(stage.attempt, stage.max_attempts, error, advanced=advanced)
    if follow_up.wait_seconds is not None:
        ready_at = at + timedelta(seconds=follow_up.wait_seconds)
        values: dict[str, Any] = {"state": StageState.READY, "ready_at": ready_at}
    else:
        values = {"state": StageState.FAILED, "finished_at": at}
    stages.guarded_update(
        session,
        stage_id,
        epoch,
        error=error_document,
        wasted_seconds=wasted_seconds,
        max_attempts=follow_up.max_attempts,
        **values,
        **stages.RELEASED_CLAIM,
    )
    again = follow_up.wait_seconds is not None
    events.append(
        session, "stage.attempt_failed", stage=stage_id, update=stage.update_id, again=again, **error_document
    )
    if not again:
        update = updates.update(session, stage.update_id)
        _fail_update(session, update, error_document | {"stage": stage.name})


def plan(session: Session, update: Update) -> None:
    """Write part two of the plan once all packs have succeeded, or fail the update if no plan is possible."""
    try:
        with session.begin_nested():
            write_training_stages(session, update)
    except StageInputInvalid as error:
        _fail_update(session, update, {"code": error.code, "detail": error.detail, "stage": "plan"})


def make_ready(session: Session, update_id: str) -> None:
    """Make pending stages ready whose needs have all succeeded."""
    # Without specs: each pack's spec names all packs before it, and this query runs after every one of them.
    rows = session.execute(
        sa.select(Stage.id, Stage.state, Stage.needs).where(Stage.update_id == update_id)
    ).all()
    succeeded = {row.id for row in rows if row.state == StageState.SUCCEEDED}
    waiting = [row.id for row in rows if row.state == StageState.PENDING and succeeded.issuperset(row.needs)]
    session.execute(
        sa.update(Stage)
        .where(Stage.id.in_(waiting), Stage.state == StageState.PENDING)
        .values(state=StageState.READY, ready_at=now(session))
        .execution_options(synchronize_session=False)
    )


def _set_succeeded(
    session: Session, stage_id: str, epoch: int, result: dict[str, Any], **values: Any
) -> None:
    stages.guarded_update(
        session,
        stage_id,
        epoch,
        state=StageState.SUCCEEDED,
        result=result,
        finished_at=now(session),
        **values,
        **stages.RELEASED_CLAIM,
    )


def _after_success(session: Session, stage: Stage, manifest: Manifest | None) -> None:
    session.refresh(stage)
    update = updates.update(session, stage.update_id)
    events.append(
        session, "stage.succeeded", stage=stage.id, update=update.id, kind=stage.kind, reused=stage.reused
    )
    if stage.kind == StageKind.TRAIN_TRUNK and not update.one_off:
        assert manifest is not None
        _record_checkpoint(session, update, stage, manifest)
    elif stage.kind == StageKind.EVALUATE:
        record_candidate(session, update, stage)
    if updates.has_unfinished_stages(session, update.id):
        make_ready(session, update.id)
    elif update.planned:
        updates.move(session, update, UpdateState.SUCCEEDED)
    else:
        plan(session, update)


def _record_checkpoint(session: Session, update: Update, stage: Stage, manifest: Manifest) -> None:
    if models.checkpoint_by_key(session, update.model_id, manifest.key) is None:
        spec = TrainStage.model_validate(stage.spec)
        session.add(
            Checkpoint(
                model_id=update.model_id,
                step=spec.to_step,
                data_version=datasets.version_by_id(session, update.data_version_id).number,
                artifact_key=manifest.key,
                sha256=manifest.sha256,
                bytes=manifest.bytes,
                created_at=now(session),
            )
        )
        session.flush()


def _fail_update(session: Session, update: Update, error: dict[str, Any]) -> None:
    updates.move(session, update, UpdateState.FAILED, error)
    updates.cancel_open_stages(session, update.id)
