"""Updates: creating them, moving them between states, and the queries that the orchestrator finds its work with."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.errors import NotFound
from service.core.paradigm_specs import ParadigmSpec
from service.core.specs import ModelSpec
from service.core.stage_specs import StageKind
from service.core.states import FINISHED_STAGES, FINISHED_UPDATES, StageState, UpdateState, sources
from service.store import events
from service.store.database import now
from service.store.paging import page
from service.store.tables import Checkpoint, DataVersion, Model, Stage, Update


def add(
    session: Session,
    model: Model,
    data_version: DataVersion,
    *,
    paradigm: ParadigmSpec | None = None,
    branch_from: Checkpoint | None = None,
) -> Update:
    """Create a pending update to a data version: the line's next one, or a one-off if ``paradigm`` is set."""
    own = ModelSpec.model_validate(model.spec).paradigm
    row = Update(
        model_id=model.id,
        data_version_id=data_version.id,
        paradigm=(paradigm or own).model_dump(mode="json"),
        one_off=paradigm is not None,
        branch_from=branch_from.id if branch_from else None,
        created_at=now(session),
    )
    session.add(row)
    session.flush()
    events.append(
        session, "update.created", update=row.id, model=model.name, data_version=data_version.number
    )
    return row


def update(session: Session, update_id: str) -> Update:
    """Raises NotFound."""
    row = session.get(Update, update_id)
    if row is None:
        raise NotFound(f"no update {update_id!r}")
    return row


def page_of_updates(
    session: Session, model_id: str, after: str | None, limit: int
) -> tuple[Sequence[Update], bool]:
    return page(session, sa.select(Update).where(Update.model_id == model_id), Update.id, after, limit)


def of_model(session: Session, model_id: str) -> Sequence[Update]:
    """Return all updates of a model, oldest first."""
    return session.scalars(sa.select(Update).where(Update.model_id == model_id).order_by(Update.id)).all()


def ids_by_data_version(session: Session, version_ids: Sequence[str]) -> dict[str, list[str]]:
    """Map each data version id to the ids of its updates, oldest first."""
    found: dict[str, list[str]] = defaultdict(list)
    query = (
        sa.select(Update.data_version_id, Update.id)
        .where(Update.data_version_id.in_(version_ids))
        .order_by(Update.id)
    )
    for version_id, update_id in session.execute(query):
        found[version_id].append(update_id)
    return found


def startable(session: Session) -> Sequence[Update]:
    """Return, for every model without a running update, the pending update with the lowest data version."""
    busy = sa.select(Update.model_id).where(Update.state == UpdateState.RUNNING)
    rows = session.scalars(
        sa.select(Update)
        .join(DataVersion, DataVersion.id == Update.data_version_id)
        .where(Update.state == UpdateState.PENDING, Update.model_id.not_in(busy))
        .order_by(Update.model_id, DataVersion.number, Update.id)
    ).all()
    first: dict[str, Update] = {}
    for row in rows:
        first.setdefault(row.model_id, row)
    return list(first.values())


def unplanned(session: Session) -> Sequence[str]:
    """Return the ids of running updates whose first stages have all succeeded, but which have no training stages yet.

    A retry after a planning failure leaves an update in this state.
    """
    unfinished = sa.exists().where(Stage.update_id == Update.id, Stage.state != StageState.SUCCEEDED)
    has_stages = sa.exists().where(Stage.update_id == Update.id)
    return session.scalars(
        sa.select(Update.id).where(
            Update.state == UpdateState.RUNNING, ~Update.planned, has_stages, ~unfinished
        )
    ).all()


def move(session: Session, row: Update, target: UpdateState, error: dict[str, object] | None = None) -> bool:
    """Move the update to ``target``. Returns False, and changes nothing, if MOVES does not allow it from the current state."""
    values: dict[str, object] = {"state": target, "error": error}
    at = now(session)
    if target == UpdateState.RUNNING:
        values |= {"finished_at": None, "started_at": row.started_at or at}
    values["finished_at"] = at if target in FINISHED_UPDATES else None
    result = session.execute(
        sa.update(Update)
        .where(Update.id == row.id, Update.state.in_(sources(target)))
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    if not result.rowcount:  # type: ignore[attr-defined]
        return False
    session.refresh(row)
    events.append(session, f"update.{target}", update=row.id)
    return True


def stages(session: Session, update_id: str) -> Sequence[Stage]:
    """Return the stages of an update in topological order."""
    # Guarded UPDATEs bypass the session, so the objects it has loaded may be stale.
    query = sa.select(Stage).where(Stage.update_id == update_id).order_by(Stage.position)
    return session.scalars(query.execution_options(populate_existing=True)).all()


def has_unfinished_stages(session: Session, update_id: str) -> bool:
    """Whether any stage of the update has not succeeded."""
    query = sa.exists().where(Stage.update_id == update_id, Stage.state != StageState.SUCCEEDED)
    return bool(session.scalar(sa.select(query)))


def stages_of_updates(
    session: Session, update_ids: Sequence[str], kinds: Collection[str] = tuple(StageKind)
) -> dict[str, list[Stage]]:
    """Map each update id to its stages of these kinds, in topological order."""
    found: dict[str, list[Stage]] = {update_id: [] for update_id in update_ids}
    query = sa.select(Stage).where(Stage.update_id.in_(update_ids), Stage.kind.in_(kinds))
    for row in session.scalars(query.order_by(Stage.update_id, Stage.position)):
        found[row.update_id].append(row)
    return found


def line_training(session: Session, model_id: str) -> Sequence[tuple[Stage, dict[str, Any]]]:
    """Return the line's finished trunk and branch stages, oldest first, each with the notes of its update."""
    query = (
        sa.select(Stage, Update.notes)
        .join(Update, Update.id == Stage.update_id)
        .where(
            Update.model_id == model_id,
            ~Update.one_off,
            Stage.kind.in_((StageKind.TRAIN_TRUNK, StageKind.TRAIN_BRANCH)),
            Stage.state == StageState.SUCCEEDED,
        )
        .order_by(Update.id, Stage.position)
    )
    return [(stage, notes) for stage, notes in session.execute(query)]


def cancel_open_stages(session: Session, update_id: str) -> None:
    """Cancel the stages that have not ended, and fence their orchestrators. ``run_id`` stays until the run has ended."""
    session.execute(
        sa.update(Stage)
        .where(Stage.update_id == update_id, Stage.state.not_in(FINISHED_STAGES))
        .values(
            state=StageState.CANCELLED,
            epoch=Stage.epoch + 1,
            owner=None,
            lease_until=None,
            finished_at=now(session),
        )
        .execution_options(synchronize_session=False)
    )
