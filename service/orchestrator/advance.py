"""One result, one transaction: a stage's end, what it makes ready, and what it means for the update.

Whoever calls these holds the stage under ``epoch``; where that is not so any more they raise Fenced and write nothing.
"""

import math
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core import retry
from service.core.errors import StageInputInvalid, Stopped, Unavailable
from service.core.executor import RunError
from service.core.manifest import Manifest
from service.core.stage_specs import StageKind, TrainStage
from service.core.states import StageState, UpdateState
from service.orchestrator.versions import record_candidate
from service.planning.training_stages import write_part_two
from service.store import datasets, events, models, stages, updates
from service.store.database import now
from service.store.tables import Checkpoint, Stage, Update


def succeed(session: Session, stage_id: str, epoch: int, manifest: Manifest) -> None:
    """A stage that was held has published its artifact."""
    stage = stages.get(session, stage_id)
    run_id, wasted = stage.run_id, stage.wasted_seconds
    # What failed attempts had trained up to the checkpoint that this one went on from was not wasted.
    carried = manifest.result.get("carried_device_seconds", 0.0) / manifest.result.get("devices", 1)
    _end_well(session, stage_id, epoch, _finite(manifest.result), wasted_seconds=max(0.0, wasted - carried))
    if run_id is not None:
        stages.next_begins(session, run_id)
    _after_success(session, stages.get(session, stage_id), manifest)


def reuse(session: Session, stage_id: str, manifest: Manifest) -> bool:
    """A ready stage whose artifact exists already succeeds at once. False where it is not ready any more."""
    row = session.execute(
        sa.update(Stage)
        .where(Stage.id == stage_id, Stage.state == StageState.READY)
        .values(
            state=StageState.SUCCEEDED,
            reused=True,
            epoch=Stage.epoch + 1,
            result=_finite(manifest.result),
            finished_at=now(session),
            ready_at=None,
        )
        .execution_options(synchronize_session=False)
    )
    if not row.rowcount:  # type: ignore[attr-defined]
        return False
    _after_success(session, stages.get(session, stage_id), manifest)
    return True


def decided(session: Session, stage_id: str, epoch: int, result: dict[str, Any]) -> None:
    """A stage that is a decision of the orchestrator's own, and publishes nothing, has ended well."""
    _end_well(session, stage_id, epoch, result)
    _after_success(session, stages.get(session, stage_id), None)


def reject(session: Session, stage_id: str, epoch: int, result: dict[str, Any]) -> None:
    """The gate has said no: the decision is made, and the update ends with it."""
    _end_well(session, stage_id, epoch, result)
    update = updates.update(session, stages.get(session, stage_id).update_id)
    updates.move(session, update, UpdateState.REJECTED)
    updates.cancel_open_stages(session, update.id)


def fail_attempt(
    session: Session, stage_id: str, epoch: int, error: RunError, *, advanced: bool = False
) -> None:
    """A try has ended badly and its run is gone: another one after a while, or the end of the update.

    A stage whose needs have not all succeeded was claimed behind them in one chain and never had its turn: it waits
    again, and no try is counted. Nor is one that has ``advanced``: it was interrupted, and the next one goes on from there.
    """
    at = now(session)
    stage = stages.get(session, stage_id)
    if not stages.needs_succeeded(session, stage):
        stages.guarded_update(
            session, stage_id, epoch, state=StageState.PENDING, attempt=Stage.attempt - 1, **stages.LET_GO
        )
        return
    written, wasted = stages.lost_attempt(stage, error, at)
    # A full disk, a store that is away or a process that had to stop says nothing about the stage: it is tried until it can be.
    max_attempts = stage.max_attempts + (advanced or error.code in (Unavailable.code, Stopped.code))
    again = retry.worth_another(stage.attempt, max_attempts, error.retryable)
    if again:
        wait = 0.0 if error.code == Stopped.code else retry.wait_before(2 if advanced else stage.attempt + 1)
        ready_at = at + timedelta(seconds=wait)
        values: dict[str, Any] = {"state": StageState.READY, "ready_at": ready_at}
    else:
        values = {"state": StageState.FAILED, "finished_at": at}
    stages.guarded_update(
        session,
        stage_id,
        epoch,
        error=written,
        wasted_seconds=wasted,
        max_attempts=max_attempts,
        **values,
        **stages.LET_GO,
    )
    events.append(
        session, "stage.attempt_failed", stage=stage_id, update=stage.update_id, again=again, **written
    )
    if not again:
        _fail_update(session, updates.update(session, stage.update_id), written | {"stage": stage.name})


def plan(session: Session, update: Update) -> None:
    """All packs are there: write part two of the plan, or fail the update with the reason why there is none."""
    try:
        with session.begin_nested():
            write_part_two(session, update)
    except StageInputInvalid as error:
        _fail_update(session, update, {"code": error.code, "detail": error.detail, "stage": "plan"})


def make_ready(session: Session, update_id: str) -> None:
    """Pending stages whose needs have all succeeded become ready."""
    # Without their specs: each pack's names all packs before it, and this is asked after every one of them.
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


def _end_well(session: Session, stage_id: str, epoch: int, result: dict[str, Any], **values: Any) -> None:
    stages.guarded_update(
        session,
        stage_id,
        epoch,
        state=StageState.SUCCEEDED,
        result=result,
        finished_at=now(session),
        **values,
        **stages.LET_GO,
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


def _finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite is stored as null, and the gate reads it as NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
