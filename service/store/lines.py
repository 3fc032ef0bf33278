"""Where a line stands: its trunk, and the newest version that it can go on from."""

from collections.abc import Collection, Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.stage_specs import TRAINING_KINDS
from service.core.states import CheckpointState
from service.store import datasets
from service.store.tables import Checkpoint, Model, ModelVersion, Stage, Update


def trunk(session: Session, model_id: str) -> Checkpoint | None:
    """Where the trunk stands: the live checkpoint with the highest step."""
    rows = live_checkpoints(session, model_id)
    return rows[-1] if rows else None


def live_checkpoints(session: Session, model_id: str) -> Sequence[Checkpoint]:
    """The trunk, from its beginning on."""
    return session.scalars(
        sa.select(Checkpoint)
        .where(Checkpoint.model_id == model_id, Checkpoint.state == CheckpointState.LIVE)
        .order_by(Checkpoint.step, Checkpoint.id)
    ).all()


def rewound_from(session: Session, model_id: str) -> int | None:
    """The step that the trunk stood at before it was rewound, as long as it has not gone on since."""
    stands = trunk(session, model_id)
    query = sa.select(sa.func.max(Checkpoint.step)).where(
        Checkpoint.model_id == model_id, Checkpoint.state == CheckpointState.ABANDONED
    )
    return session.scalar(query.where(Checkpoint.id > stands.id) if stands else query)


def newest_version(session: Session, model: Model, *, before: int | None = None) -> ModelVersion | None:
    """The line's version of the newest data (before a data version) that has read nothing excluded; the last made of those."""
    query = (
        sa.select(ModelVersion)
        .join(Update, Update.id == ModelVersion.update_id)
        .where(ModelVersion.model_id == model.id, ~Update.one_off)
        .order_by(ModelVersion.data_version.desc(), ModelVersion.number.desc())
    )
    if before is not None:
        query = query.where(ModelVersion.data_version < before)
    excluded = datasets.excluded_numbers(session, model.dataset_id)
    if not excluded:
        return session.scalar(query.limit(1))
    rows = session.scalars(query).all()
    read = data_read(session, [row.update_id for row in rows])
    return next((row for row in rows if excluded.isdisjoint(read[row.update_id])), None)


def data_read(session: Session, update_ids: Collection[str]) -> dict[str, set[int]]:
    """Update id -> numbers of the data versions that its training stages read, or are to read."""
    found: dict[str, set[int]] = {update_id: set() for update_id in update_ids}
    query = sa.select(Stage.update_id, Stage.spec).where(
        Stage.update_id.in_(update_ids), Stage.kind.in_(TRAINING_KINDS)
    )
    for update_id, spec in session.execute(query):
        found[update_id].update(entry["number"] for entry in spec["ledger"])
    return found
