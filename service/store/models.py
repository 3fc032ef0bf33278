"""Queries for models, their checkpoints and their versions."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.errors import NotFound
from service.core.serving_specs import ServingSpec
from service.core.states import CheckpointState, ModelVersionState, UpdateState
from service.store.paging import page
from service.store.tables import Checkpoint, Model, ModelVersion, Update


def model(session: Session, name: str, *, lock: bool = False) -> Model:
    """Return the model with that name, with a row lock if ``lock``. Raises NotFound."""
    query = sa.select(Model).where(Model.name == name)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFound(f"no model {name!r}")
    return row


def serving_spec(model: Model) -> ServingSpec:
    """Return the model's serving spec. Models made before the field existed get the defaults."""
    return ServingSpec.model_validate(model.spec.get("serving", {}))


def by_id(session: Session, model_id: str) -> Model:
    row = session.get(Model, model_id)
    assert row is not None
    return row


def by_ids(session: Session, model_ids: Collection[str]) -> dict[str, Model]:
    rows = session.scalars(sa.select(Model).where(Model.id.in_(model_ids)))
    return {row.id: row for row in rows}


def all_models(session: Session) -> Sequence[Model]:
    return session.scalars(sa.select(Model).order_by(Model.id)).all()


def page_of_models(session: Session, after: str | None, limit: int) -> tuple[Sequence[Model], bool]:
    return page(session, sa.select(Model), Model.id, after, limit)


def page_of_versions(
    session: Session, model_id: str, after: str | None, limit: int
) -> tuple[Sequence[ModelVersion], bool]:
    query = sa.select(ModelVersion).where(ModelVersion.model_id == model_id)
    return page(session, query, ModelVersion.number, after, limit)


def page_of_checkpoints(
    session: Session, model_id: str, after: str | None, limit: int
) -> tuple[Sequence[Checkpoint], bool]:
    query = sa.select(Checkpoint).where(Checkpoint.model_id == model_id)
    return page(session, query, Checkpoint.id, after, limit)


@dataclass
class ModelStatus:
    """The current state of a model. ``update_id`` is its running update."""

    trunk_step: int = 0
    latest_version: int | None = None
    served_version: int | None = None
    update_id: str | None = None


def statuses(session: Session, model_ids: Sequence[str]) -> dict[str, ModelStatus]:
    """Map each model id to its status. The number of queries does not depend on the number of models."""
    found = {model_id: ModelStatus() for model_id in model_ids}
    trunks = (
        sa.select(Checkpoint.model_id, sa.func.max(Checkpoint.step))
        .where(Checkpoint.model_id.in_(model_ids), Checkpoint.state == CheckpointState.LIVE)
        .group_by(Checkpoint.model_id)
    )
    for model_id, step in session.execute(trunks):
        found[model_id].trunk_step = step
    is_served = ModelVersion.state == ModelVersionState.RELEASED
    numbers = (
        sa.select(
            ModelVersion.model_id,
            sa.func.max(ModelVersion.number),
            sa.func.max(sa.case((is_served, ModelVersion.number))),
        )
        .where(ModelVersion.model_id.in_(model_ids))
        .group_by(ModelVersion.model_id)
    )
    for model_id, latest, served_number in session.execute(numbers):
        found[model_id].latest_version, found[model_id].served_version = latest, served_number
    running = sa.select(Update.model_id, Update.id).where(
        Update.model_id.in_(model_ids), Update.state == UpdateState.RUNNING
    )
    for model_id, update_id in session.execute(running):
        found[model_id].update_id = update_id
    return found


def following(session: Session, dataset_ids: Collection[str]) -> dict[str, list[Model]]:
    """Map each dataset id to the models on it that update automatically with every data version."""
    found: dict[str, list[Model]] = defaultdict(list)
    for row in session.scalars(sa.select(Model).where(Model.dataset_id.in_(dataset_ids)).order_by(Model.id)):
        if row.spec["auto_update"]:
            found[row.dataset_id].append(row)
    return found


def of_dataset(session: Session, dataset_id: str) -> Sequence[Model]:
    return session.scalars(sa.select(Model).where(Model.dataset_id == dataset_id).order_by(Model.id)).all()


def checkpoint(session: Session, model_id: str, checkpoint_id: str) -> Checkpoint:
    """Raises NotFound."""
    row = session.get(Checkpoint, checkpoint_id)
    if row is None or row.model_id != model_id:
        raise NotFound(f"no checkpoint {checkpoint_id!r} of this model")
    return row


def abandoned_keys(session: Session, model_id: str) -> frozenset[str]:
    """Return the artifact keys of the trunk checkpoints that a rewind abandoned."""
    query = sa.select(Checkpoint.artifact_key).where(
        Checkpoint.model_id == model_id, Checkpoint.state == CheckpointState.ABANDONED
    )
    return frozenset(session.scalars(query))


def checkpoint_by_key(session: Session, model_id: str, key: str) -> Checkpoint | None:
    return session.scalar(
        sa.select(Checkpoint).where(Checkpoint.model_id == model_id, Checkpoint.artifact_key == key)
    )


def version(session: Session, model_id: str, number: int | str) -> ModelVersion:
    """Return a model version by number, ``"latest"`` or ``"served"``. Raises NotFound."""
    query = sa.select(ModelVersion).where(ModelVersion.model_id == model_id)
    if number == "latest":
        query = query.order_by(ModelVersion.number.desc()).limit(1)
    elif number == "served":
        query = query.where(ModelVersion.state == ModelVersionState.RELEASED)
    else:
        try:
            query = query.where(ModelVersion.number == int(number))
        except ValueError:
            raise NotFound(f"no model version {number!r}") from None
    row = session.scalar(query)
    if row is None:
        raise NotFound(f"no model version {number!r}")
    return row


def version_by_id(session: Session, version_id: str) -> ModelVersion:
    row = session.get(ModelVersion, version_id)
    assert row is not None
    return row


def versions_by_ids(session: Session, version_ids: Collection[str]) -> dict[str, ModelVersion]:
    rows = session.scalars(sa.select(ModelVersion).where(ModelVersion.id.in_(version_ids)))
    return {row.id: row for row in rows}


def version_of_update(session: Session, update_id: str) -> ModelVersion | None:
    return session.scalar(sa.select(ModelVersion).where(ModelVersion.update_id == update_id))


def numbers_of_updates(session: Session, update_ids: Sequence[str]) -> dict[str, int]:
    """Map update ids to the numbers of the model versions they made. Updates without a version are left out."""
    query = sa.select(ModelVersion.update_id, ModelVersion.number).where(
        ModelVersion.update_id.in_(update_ids)
    )
    return {row[0]: row[1] for row in session.execute(query)}


def served(session: Session, model_id: str) -> ModelVersion | None:
    return session.scalar(
        sa.select(ModelVersion).where(
            ModelVersion.model_id == model_id, ModelVersion.state == ModelVersionState.RELEASED
        )
    )


def versions(session: Session, model_id: str) -> Sequence[ModelVersion]:
    return session.scalars(
        sa.select(ModelVersion).where(ModelVersion.model_id == model_id).order_by(ModelVersion.number)
    ).all()


def next_number(session: Session, model_id: str) -> int:
    """Return the number of the model's next version.

    Call it only on behalf of the model's running update: there is at most one, which makes the number safe from races.
    """
    newest = session.scalar(
        sa.select(sa.func.max(ModelVersion.number)).where(ModelVersion.model_id == model_id)
    )
    return (newest or 0) + 1
