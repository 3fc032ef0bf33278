"""Registers ingested bodies as uploaded evaluation sets of a dataset."""

from dataclasses import dataclass

from service.core.errors import Conflict, InvalidRequest
from service.core.stage_specs import is_holdout_name
from service.ingest.ingest import Ingest, Ingested
from service.store import datasets, events
from service.store.database import Database
from service.store.in_use import share_artifacts
from service.store.tables import Slice


@dataclass(frozen=True)
class RegisteredSlice:
    """``created`` is False if the dataset already had the slice."""

    row: Slice
    created: bool


class _ArtifactCollected(Exception):
    """Garbage collection has removed the published artifact before the row was written."""


def check_slice(database: Database, dataset_name: str, name: str) -> None:
    """Check a request before its body is read.

    Raises NotFound for an unknown dataset, InvalidRequest if the name is reserved for a holdout.
    """
    with database.reading() as session:
        datasets.dataset(session, dataset_name)
    if is_holdout_name(name):
        raise InvalidRequest(f"the name {name!r} is reserved for the holdout of a data version")


def register_slice(
    database: Database, dataset_name: str, ingest: Ingest, *, name: str, data_version: int | None = None
) -> RegisteredSlice:
    """Register an ended body as an uploaded evaluation set. Its data version need not exist yet.

    Raises NotFound for an unknown dataset, Conflict if the dataset has a different slice with that name.
    """
    while True:
        ingested = ingest.publish_slice()
        try:
            return _write(database, dataset_name, ingest, ingested, name, data_version)
        except _ArtifactCollected:
            continue


def _write(
    database: Database,
    dataset_name: str,
    ingest: Ingest,
    ingested: Ingested,
    name: str,
    data_version: int | None,
) -> RegisteredSlice:
    with database.transaction() as session:
        dataset = datasets.dataset(session, dataset_name, lock=True)
        row = datasets.uploaded_slice(session, dataset.id, name)
        if row is not None:
            if (row.artifact_key, row.data_version) != (ingested.manifest.key, data_version):
                raise Conflict(f"the slice {name!r} exists with other content or for another data version")
            return RegisteredSlice(row, created=False)
        created_at = share_artifacts(session)
        if not ingest.is_published(ingested):
            raise _ArtifactCollected
        row = Slice(
            dataset_id=dataset.id,
            name=name,
            data_version=data_version,
            documents=ingested.documents,
            artifact_key=ingested.manifest.key,
            created_at=created_at,
        )
        session.add(row)
        session.flush()
        events.append(session, "slice.created", dataset=dataset_name, slice=name, id=row.id)
    return RegisteredSlice(row, created=True)
