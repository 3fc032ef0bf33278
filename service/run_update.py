"""Start, cancel and retry updates on request."""

from sqlalchemy.exc import IntegrityError

from service.core.errors import Conflict, InvalidRequest
from service.core.retry import MAX_ATTEMPTS
from service.core.states import StageState, UpdateState
from service.store import datasets, models, updates
from service.store.database import Database, now
from service.store.tables import Stage, Update


def start_update(database: Database, model_name: str, data_version: int | None = None) -> Update:
    """Write a pending update of the model, to the newest data version or the one given.

    Raises NotFound, or InvalidRequest where there is no data yet or the trunk has passed that version.
    """
    with database.transaction() as session:
        model = models.model(session, model_name)
        if data_version is None:
            target = datasets.newest_version(session, model.dataset_id)
            if target is None:
                raise InvalidRequest(f"the dataset of {model_name!r} has no data version yet")
        else:
            target = datasets.version(session, model.dataset_id, data_version)
        trunk = models.trunk(session, model.id)
        if trunk is not None and trunk.data_version > target.number:
            raise InvalidRequest(
                f"the trunk of {model_name!r} stands in data version {trunk.data_version}, "
                f"past data version {target.number}"
            )
        return updates.add(session, model, target)


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
