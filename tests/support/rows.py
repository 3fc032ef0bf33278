"""Rows for tests that need something to stand on, written through the store."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from service.core.specs import ModelSpec
from service.core.stage_specs import StageKind
from service.core.states import StageState, UpdateState
from service.store import datasets, updates
from service.store.database import Database, now
from service.store.tables import Dataset, DataVersion, Model, Stage, Update
from tests.support.specs import PLAIN


def add_dataset(session: Session, name: str = "d", versions: int = 1) -> Dataset:
    """A dataset with that many data versions, whose artifacts do not exist."""
    row = Dataset(name=name, holdout_fraction=0.02, created_at=now(session))
    session.add(row)
    session.flush()
    for number in range(1, versions + 1):
        add_data_version(session, row, number)
    return row


def add_data_version(session: Session, dataset: Dataset, number: int) -> DataVersion:
    row = DataVersion(
        dataset_id=dataset.id,
        number=number,
        sha256=f"{dataset.name}-{number}",
        bytes=1000,
        documents=10,
        duplicates=0,
        holdout_documents=1,
        artifact_key=f"data/{dataset.name}-{number}",
        created_at=now(session),
    )
    session.add(row)
    session.flush()
    return row


def add_model(session: Session, dataset: Dataset, name: str = "m") -> Model:
    spec = ModelSpec.model_validate(PLAIN | {"name": name, "dataset": dataset.name})
    row = Model(name=name, dataset_id=dataset.id, spec=spec.model_dump(mode="json"), created_at=now(session))
    session.add(row)
    session.flush()
    return row


def add_running_update(session: Session, model: Model, data_version: DataVersion) -> Update:
    row = updates.add(session, model, data_version)
    updates.move(session, row, UpdateState.RUNNING)
    return row


def add_ready_stages(session: Session, update: Update, keys: Sequence[str]) -> list[Stage]:
    """Ready pack stages that would publish under ``keys``."""
    rows = [
        Stage(
            update_id=update.id,
            position=position,
            name=f"stage-{position}",
            kind=StageKind.PACK,
            spec={},
            key=key,
            needs=[],
            state=StageState.READY,
            ready_at=now(session),
            created_at=now(session),
        )
        for position, key in enumerate(keys)
    ]
    session.add_all(rows)
    session.flush()
    return rows


def ready_stage(database: Database, key: str = "pack/a") -> Stage:
    """One ready stage in an otherwise empty database."""
    with database.transaction() as session:
        dataset = add_dataset(session)
        model = add_model(session, dataset)
        update = add_running_update(session, model, datasets.version(session, dataset.id, 1))
        return add_ready_stages(session, update, [key])[0]
