"""Start, cancel and retry updates on request."""

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.core.errors import Conflict, InvalidRequest, StageInputInvalid
from service.core.paradigms.branching import branch_from_geometry
from service.core.retry import MAX_ATTEMPTS
from service.core.specs import BranchSpec, ModelSpec, ParadigmSpec, PathSwitchingSpec
from service.core.stage_specs import LineSpec
from service.core.states import CheckpointState, StageState, UpdateState
from service.store import datasets, lines, models, stages, updates
from service.store.database import Database, now
from service.store.tables import DataVersion, Model, Stage, Update


def start_update(database: Database, model_name: str, data_version: int | None = None) -> Update:
    """Write a pending update of the model, to the newest data version or the one given.

    Raises NotFound, or InvalidRequest where there is no data yet or the line has passed that version.
    """
    with database.transaction() as session:
        model = models.model(session, model_name)
        target = _target(session, model, data_version)
        if (passed := _passed(session, model, target)) is not None:
            raise InvalidRequest(passed)
        return updates.add(session, model, target)


def start_one_off(
    database: Database, model_name: str, paradigm: ParadigmSpec, data_version: int | None = None
) -> Update:
    """Write a pending update under another paradigm than the model's. Its line and trunk stay as they are.

    Raises NotFound, or InvalidRequest where there is no data yet.
    """
    with database.transaction() as session:
        model = models.model(session, model_name)
        return updates.add(session, model, _target(session, model, data_version), paradigm=paradigm)


def start_branch(
    database: Database,
    model_name: str,
    checkpoint_id: str,
    decay: BranchSpec | None = None,
    data_version: int | None = None,
) -> Update:
    """Write a pending update that is a branch from a trunk checkpoint, under any decay: what it does not say is the model's own.

    It reads up to the end of the checkpoint's data version, or of a later one on request. Raises NotFound, or
    InvalidRequest where the branch would read past that end, as far as the steps are known already.
    """
    with database.transaction() as session:
        model = models.model(session, model_name)
        checkpoint = models.checkpoint(session, model.id, checkpoint_id)
        if checkpoint.state != CheckpointState.LIVE:
            raise InvalidRequest(f"checkpoint {checkpoint_id} has read data that is excluded since")
        if data_version is not None and data_version < checkpoint.data_version:
            raise InvalidRequest(
                f"checkpoint {checkpoint_id} lies in data version {checkpoint.data_version}, "
                f"past data version {data_version}"
            )
        target = _target(session, model, data_version or checkpoint.data_version)
        own = ModelSpec.model_validate(model.spec).paradigm
        decay = _over(own.decay if isinstance(own, PathSwitchingSpec) else BranchSpec(), decay)
        ledger = stages.known_ledger(session, model.id, target.number)
        excluded = datasets.excluded_numbers(session, model.dataset_id)
        if ledger is not None and excluded.isdisjoint(entry.number for entry in ledger):
            try:
                branch_from_geometry(decay, ledger, checkpoint.step, LineSpec.model_validate(model.line))
            except StageInputInvalid as error:
                raise InvalidRequest(error.detail) from error
        return updates.add(
            session, model, target, paradigm=PathSwitchingSpec(decay=decay), branch_from=checkpoint
        )


def _passed(session: Session, model: Model, target: DataVersion) -> str | None:
    """Why the line cannot make a version of that data any more: it, or its trunk, has read later data."""
    trunk, newest = lines.trunk(session, model.id), lines.newest_version(session, model)
    stands_in = max(trunk.data_version if trunk else 0, newest.data_version if newest else 0)
    if stands_in <= target.number:
        return None
    return f"the line of {model.name!r} stands in data version {stands_in}, past data version {target.number}"


def _target(session: Session, model: Model, data_version: int | None) -> DataVersion:
    if data_version is not None:
        given = datasets.version(session, model.dataset_id, data_version)
        if given.excluded_at is not None:
            raise InvalidRequest(f"data version {data_version} is excluded: {given.excluded_reason}")
        return given
    newest = datasets.newest_version(session, model.dataset_id)
    if newest is None:
        raise InvalidRequest(f"the dataset of {model.name!r} has no data version yet")
    return newest


def cancel_update(database: Database, update_id: str) -> Update:
    """End an update that has not ended. What it published stays, and the next update goes on from it."""
    with database.transaction() as session:
        row = updates.update(session, update_id)
        if row.state == UpdateState.CANCELLED:
            return row
        if not updates.move(session, row, UpdateState.CANCELLED):
            raise Conflict(f"update {update_id} is {row.state}: it cannot be cancelled")
        updates.cancel_open_stages(session, update_id)
    return row


def retry_update(database: Database, update_id: str) -> Update:
    """Let a failed update go on from its last good stage, with a fresh number of attempts."""
    try:
        with database.transaction() as session:
            row = updates.update(session, update_id)
            if row.state != UpdateState.FAILED:
                raise Conflict(f"update {update_id} is {row.state}: only a failed one can be retried")
            target = datasets.version_by_id(session, row.data_version_id)
            if target.excluded_at is not None:
                raise Conflict(f"data version {target.number} is excluded: {target.excluded_reason}")
            model = models.by_id(session, row.model_id)
            if not row.one_off and (passed := _passed(session, model, target)) is not None:
                raise Conflict(passed)
            rows = updates.stages(session, update_id)
            updates.move(session, row, UpdateState.RUNNING if rows else UpdateState.PENDING)
            succeeded = {stage.id for stage in rows if stage.state == StageState.SUCCEEDED}
            for stage in rows:
                if stage.state in (StageState.FAILED, StageState.CANCELLED):
                    _reopen(stage, ready=succeeded.issuperset(stage.needs))
                    stage.ready_at = now(session) if stage.state == StageState.READY else None
            session.flush()
    except IntegrityError as error:
        raise Conflict("another update of the model is running: retry when it has ended") from error
    return row


def _reopen(stage: Stage, *, ready: bool) -> None:
    stage.state = StageState.READY if ready else StageState.PENDING
    stage.finished_at = None
    stage.error = None
    stage.max_attempts = stage.attempt + MAX_ATTEMPTS


def _over(own: BranchSpec, given: BranchSpec | None) -> BranchSpec:
    """The model's own decay with what was said of another. Another shape has cuts and a floor of its own."""
    if given is None:
        return own
    said = given.model_dump(include=given.model_fields_set)
    kept = own.model_dump(exclude={"cuts", "floor"} if "shape" in said else set())
    return BranchSpec.model_validate(kept | said)
