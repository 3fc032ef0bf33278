"""Register data: create a dataset, and write down an ingested body as a given slice of it. Versions: register_versions."""

from dataclasses import dataclass

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.core.errors import Conflict, InvalidRequest
from service.core.stage_specs import is_holdout_name
from service.ingest.ingest import Ingest, Ingested
from service.store import datasets, events
from service.store.database import Database, now
from service.store.in_use import share_artifacts
from service.store.tables import Dataset, Slice


@dataclass(frozen=True)
class RegisteredSlice:
    row: Slice
    created: bool


def create_dataset(
    database: Database, name: str, *, description: str | None = None, holdout_fraction: float = 0.02
) -> Dataset:
    """Raises Conflict where the name is taken."""
    try:
        with database.transaction() as session:
            row = Dataset(
                name=name,
                description=description,
                holdout_fraction=holdout_fraction,
                created_at=now(session),
            )
            session.add(row)
            session.flush()
            events.append(session, "dataset.created", dataset=name)
    except IntegrityError as error:
        raise Conflict(f"the name {name!r} is taken") from error
    return row


def register_slice(
    database: Database, dataset_name: str, ingest: Ingest, *, name: str, data_version: int | None = None
) -> RegisteredSlice:
    """Register an ingested body as a given evaluation set. It may be given before the data version it is for.

    Raises NotFound for an unknown dataset, Conflict where the dataset has another slice of that name.
    """
    while True:
        ingested = ingest.publish_slice()
        with database.transaction() as session:
            dataset = datasets.dataset(session, dataset_name, lock=True)
            row = datasets.given_slice(session, dataset.id, name)
            if row is not None:
                if (row.artifact_key, row.data_version) != (ingested.manifest.key, data_version):
                    raise Conflict(f"the slice {name!r} exists, of other content or for another data version")
                return RegisteredSlice(row, created=False)
            if not _holds(session, ingest, ingested):
                continue
            row = Slice(
                dataset_id=dataset.id,
                name=name,
                data_version=data_version,
                documents=ingested.documents,
                artifact_key=ingested.manifest.key,
                created_at=now(session),
            )
            session.add(row)
            session.flush()
            events.append(session, "slice.created", dataset=dataset_name, slice=name, id=row.id)
        return RegisteredSlice(row, created=True)


def check_slice(database: Database, dataset_name: str, name: str) -> None:
    """Before a body is read: raise NotFound for an unknown dataset, InvalidRequest for a holdout's name."""
    with database.reading() as session:
        datasets.dataset(session, dataset_name)
    if is_holdout_name(name):
        raise InvalidRequest(f"{name!r} is the name of the holdout of a data version")


def _holds(session: Session, ingest: Ingest, ingested: Ingested) -> bool:
    """Whether what was published is there, and will be until the row says so.

    It may have been found rather than written: left by a registration that died, and old enough to be collected meanwhile.
    """
    share_artifacts(session)
    return ingest.has(ingested)
