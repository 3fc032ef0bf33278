"""The current position of a line: its trunk, the version it continues from, and the ledger it has read."""

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.ledger import LedgerEntry
from service.core.plan import pack_name
from service.core.stage_specs import TRAINING_KINDS, StageKind, TrainStage
from service.core.states import CheckpointState
from service.store import datasets
from service.store.tables import Checkpoint, Model, ModelVersion, Stage, Update


def trunk(session: Session, model_id: str) -> Checkpoint | None:
    """Return the head of the trunk: the live checkpoint with the highest step."""
    rows = live_checkpoints(session, model_id)
    return rows[-1] if rows else None


def live_checkpoints(session: Session, model_id: str) -> Sequence[Checkpoint]:
    """Return the checkpoints of the trunk, in order of step."""
    return session.scalars(
        sa.select(Checkpoint)
        .where(Checkpoint.model_id == model_id, Checkpoint.state == CheckpointState.LIVE)
        .order_by(Checkpoint.step, Checkpoint.id)
    ).all()


def rewound_from(session: Session, model_id: str) -> int | None:
    """Return the step the trunk was rewound from; None when it was not, or has advanced since."""
    head = trunk(session, model_id)
    query = sa.select(sa.func.max(Checkpoint.step)).where(
        Checkpoint.model_id == model_id, Checkpoint.state == CheckpointState.ABANDONED
    )
    return session.scalar(query.where(Checkpoint.id > head.id) if head else query)


def newest_version(session: Session, model: Model, *, before: int | None = None) -> ModelVersion | None:
    """Return the version that the line continues from, ignoring one-offs and versions trained on excluded data.

    If several versions share a data version, the latest one counts. ``before`` ignores data versions from that number
    on.
    """
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
    """Map each update id to the numbers of the data versions that its training stages read or will read."""
    found: dict[str, set[int]] = {update_id: set() for update_id in update_ids}
    query = sa.select(Stage.update_id, Stage.spec).where(
        Stage.update_id.in_(update_ids), Stage.kind.in_(TRAINING_KINDS)
    )
    for update_id, spec in session.execute(query):
        found[update_id].update(entry["number"] for entry in spec["ledger"])
    return found


def spec_by_key(session: Session, key: str) -> dict[str, Any]:
    """Return the spec of the stages that publish under ``key``. Equal keys have equal specs."""
    spec: dict[str, Any] | None = session.scalar(sa.select(Stage.spec).where(Stage.key == key).limit(1))
    assert spec is not None
    return spec


def newest_pack_specs(session: Session, model_id: str, up_to: int) -> dict[str, dict[str, Any]]:
    """Map stage names to the specs of the packs up to data version ``up_to``, as the line's newest planned update has them."""
    newest = (
        sa.select(Update.id)
        .where(Update.model_id == model_id, Update.planned, ~Update.one_off)
        .order_by(Update.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    rows = session.execute(
        sa.select(Stage.name, Stage.spec).where(Stage.update_id == newest, Stage.kind == StageKind.PACK)
    ).all()
    wanted = {pack_name(number) for number in range(1, up_to + 1)}
    return {name: spec for name, spec in rows if name in wanted}


def known_ledger(session: Session, model_id: str, up_to: int) -> tuple[LedgerEntry, ...] | None:
    """Return the line's ledger up to data version ``up_to``, or None when no training stage has read that far."""
    rows = session.scalars(
        sa.select(Stage.spec)
        .join(Update, Update.id == Stage.update_id)
        .where(Update.model_id == model_id, ~Update.one_off, Stage.kind.in_(TRAINING_KINDS))
        .order_by(Stage.id.desc())
    )
    for spec in rows:
        ledger = TrainStage.model_validate(spec).ledger
        if any(entry.number >= up_to for entry in ledger):
            return tuple(entry for entry in ledger if entry.number <= up_to)
    return None
