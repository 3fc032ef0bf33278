"""Rows that tests need in the database, written through the store."""

from collections.abc import Sequence

from sqlalchemy.orm import Session

from service.core.specs import ModelSpec
from service.core.stage_specs import StageKind
from service.core.states import ModelVersionState, ReleaseState, StageState, UpdateState
from service.store import datasets, events, updates
from service.store.database import Database, now
from service.store.tables import (
    Checkpoint,
    Dataset,
    DataVersion,
    IdempotentRequest,
    MetricPoint,
    Model,
    ModelVersion,
    Observation,
    Release,
    Slice,
    Stage,
    Update,
)
from tests.support.specs import PLAIN


def add_dataset(session: Session, name: str = "d", versions: int = 1) -> Dataset:
    """A dataset with that many data versions, without their artifacts."""
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
    """Ready pack stages that publish under ``keys``."""
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


def fill(session: Session) -> None:
    """Rows in every table: a released version, and an update that runs on an excluded version."""
    at = now(session)
    dataset = add_dataset(session, versions=2)
    model = add_model(session, dataset)
    first = add_running_update(session, model, datasets.version(session, dataset.id, 1))
    stage = add_ready_stages(session, first, ["pack/a"])[0]
    stage.state, stage.finished_at, stage.result = StageState.SUCCEEDED, at, {"bytes": 1}
    checkpoint = Checkpoint(
        model_id=model.id,
        step=90,
        data_version=1,
        artifact_key="checkpoint/c",
        sha256="c",
        bytes=1,
        created_at=at,
    )
    session.add_all(
        [
            checkpoint,
            Slice(dataset_id=dataset.id, name="s", documents=1, artifact_key="slice/s", created_at=at),
            MetricPoint(
                stage_id=stage.id, step=1, loss=4.0, learning_rate=1e-3, grad_norm=1.0, tokens_per_second=1e3
            ),
            IdempotentRequest(
                key="k",
                target="POST /",
                owner="o",
                lease_until=at,
                carried_out=True,
                request_sha256="r",
                status=201,
                media_type="application/json",
                body=b"{}",
                created_at=at,
            ),
        ]
    )
    session.flush()
    version = ModelVersion(
        model_id=model.id,
        number=1,
        data_version=1,
        update_id=first.id,
        state=ModelVersionState.RELEASED,
        checkpoint_id=checkpoint.id,
        branch_point=90,
        final_step=100,
        parameters=1000,
        evaluations=[{"slice": "v1", "loss": 4.0}],
        cost={},
        export_key="export/e",
        created_at=at,
    )
    session.add(version)
    session.flush()
    session.add(
        Release(
            model_id=model.id,
            model_version_id=version.id,
            state=ReleaseState.LIVE,
            by="gate",
            requested_at=at,
            released_at=at,
        )
    )
    session.add(Observation(model_id=model.id, replicas=[], observed_at=at))
    updates.move(session, first, UpdateState.SUCCEEDED)
    excluded = datasets.version(session, dataset.id, 2)
    excluded.excluded_at, excluded.excluded_reason = at, "a mirror"
    second = updates.add(session, model, excluded)
    second.one_off, second.branch_from = True, checkpoint.id
    updates.move(session, second, UpdateState.RUNNING)
    add_ready_stages(session, second, ["pack/b"])
    events.append(session, "model.created", model=model.name)
