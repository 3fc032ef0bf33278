"""Starts, cancels and retries updates on request."""

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.core.errors import Conflict, InvalidRequest, StageInputInvalid
from service.core.paradigm_specs import BranchSpec, ParadigmSpec, PathSwitchingSpec
from service.core.paradigms.branching import branch_from_geometry
from service.core.retry import MAX_ATTEMPTS
from service.core.specs import ModelSpec
from service.core.stage_specs import LineSpec
from service.core.states import CheckpointState, StageState, UpdateState
from service.store import datasets, lines, models, updates
from service.store.database import Database, now
from service.store.tables import DataVersion, Model, Stage, Update


def request_update(database: Database, model_name: str, data_version: int | None = None) -> Update:
    """Write a pending update of the model to ``data_version``, by default the newest.

    Raises NotFound, or InvalidRequest if the dataset is empty or the line has passed that data version.
    """
    with database.transaction() as session:
        model = models.model(session, model_name)
        target = _target(session, model, data_version)
        if (reason := _reason_to_reject(session, model, target)) is not None:
            raise InvalidRequest(reason)
        return updates.add(session, model, target)


def request_one_off(
    database: Database, model_name: str, paradigm: ParadigmSpec, data_version: int | None = None
) -> Update:
    """Write a pending update under another paradigm. The model's line and trunk stay as they are.

    Raises NotFound, or InvalidRequest if the dataset is empty.
    """
    with database.transaction() as session:
        model = models.model(session, model_name)
        return updates.add(session, model, _target(session, model, data_version), paradigm=paradigm)


def request_branch(
    database: Database,
    model_name: str,
    checkpoint_id: str,
    decay: BranchSpec | None = None,
    data_version: int | None = None,
) -> Update:
    """Create a pending update that branches from a trunk checkpoint. ``decay`` overrides fields of the model's decay.

    The branch may read up to the end of ``data_version``, by default the checkpoint's. Raises NotFound, or
    InvalidRequest if it would read past that end and the steps are already known.
    """
    with database.transaction() as session:
        model = models.model(session, model_name)
        checkpoint = models.checkpoint(session, model.id, checkpoint_id)
        if checkpoint.state != CheckpointState.LIVE:
            raise InvalidRequest(
                f"checkpoint {checkpoint_id} was trained on data that has since been excluded: choose a live one"
            )
        if data_version is not None and data_version < checkpoint.data_version:
            raise InvalidRequest(
                f"checkpoint {checkpoint_id} lies in data version {checkpoint.data_version}, "
                f"after data version {data_version}"
            )
        target = _target(session, model, data_version or checkpoint.data_version)
        paradigm = ModelSpec.model_validate(model.spec).paradigm
        own = paradigm.decay if isinstance(paradigm, PathSwitchingSpec) else BranchSpec()
        decay = _override(own, decay)
        ledger = lines.known_ledger(session, model.id, target.number)
        excluded = datasets.excluded_numbers(session, model.dataset_id)
        if ledger is not None and excluded.isdisjoint(entry.number for entry in ledger):
            try:
                branch_from_geometry(decay, ledger, checkpoint.step, LineSpec.model_validate(model.line))
            except StageInputInvalid as error:
                raise InvalidRequest(error.detail) from error
        return updates.add(
            session, model, target, paradigm=PathSwitchingSpec(decay=decay), branch_from=checkpoint
        )


def _reason_to_reject(session: Session, model: Model, target: DataVersion) -> str | None:
    """Return why the line can no longer train on ``target`` (it, or its trunk, has read later data), or None if it can."""
    trunk, newest = lines.trunk(session, model.id), lines.newest_version(session, model)
    position = max(trunk.data_version if trunk else 0, newest.data_version if newest else 0)
    if position <= target.number:
        return None
    return (
        f"model {model.name!r} has already read data version {position}, after data version {target.number}"
    )


def _target(session: Session, model: Model, data_version: int | None) -> DataVersion:
    if data_version is not None:
        row = datasets.version(session, model.dataset_id, data_version)
        if row.excluded_at is not None:
            raise InvalidRequest(f"data version {data_version} is excluded: {row.excluded_reason}")
        return row
    newest = datasets.newest_version(session, model.dataset_id)
    if newest is None:
        raise InvalidRequest(f"the dataset of model {model.name!r} has no data version yet: push one first")
    return newest


def cancel_update(database: Database, update_id: str) -> Update:
    """Cancel an unfinished update. Its artifacts stay, and the next update continues from them."""
    with database.transaction() as session:
        row = updates.update(session, update_id)
        if row.state == UpdateState.CANCELLED:
            return row
        if not updates.move(session, row, UpdateState.CANCELLED):
            raise Conflict(f"update {update_id} is {row.state} and can no longer be cancelled")
        updates.cancel_open_stages(session, update_id)
    return row


def retry_update(database: Database, update_id: str) -> Update:
    """Resume a failed update from its last good stage, with the full number of attempts."""
    try:
        with database.transaction() as session:
            row = updates.update(session, update_id)
            if row.state != UpdateState.FAILED:
                raise Conflict(f"update {update_id} is {row.state}: only failed updates can be retried")
            target = datasets.version_by_id(session, row.data_version_id)
            if target.excluded_at is not None:
                raise Conflict(f"data version {target.number} is excluded: {target.excluded_reason}")
            model = models.by_id(session, row.model_id)
            if not row.one_off and (reason := _reason_to_reject(session, model, target)) is not None:
                raise Conflict(reason)
            rows = updates.stages(session, update_id)
            updates.move(session, row, UpdateState.RUNNING if rows else UpdateState.PENDING)
            succeeded = {stage.id for stage in rows if stage.state == StageState.SUCCEEDED}
            for stage in rows:
                if stage.state in (StageState.FAILED, StageState.CANCELLED):
                    _reopen(stage, ready=succeeded.issuperset(stage.needs))
                    stage.ready_at = now(session) if stage.state == StageState.READY else None
            session.flush()
    except IntegrityError as error:
        raise Conflict("another update of this model is running: retry when it has ended") from error
    return row


def _reopen(stage: Stage, *, ready: bool) -> None:
    stage.state = StageState.READY if ready else StageState.PENDING
    stage.finished_at = None
    stage.error = None
    stage.max_attempts = stage.attempt + MAX_ATTEMPTS


def _override(own: BranchSpec, requested: BranchSpec | None) -> BranchSpec:
    """Override the model's decay with the fields set in ``requested``. With another shape, cuts and floor don't carry over."""
    if requested is None:
        return own
    changes = requested.model_dump(include=requested.model_fields_set)
    kept = own.model_dump(exclude={"cuts", "floor"} if "shape" in changes else set())
    return BranchSpec.model_validate(kept | changes)
