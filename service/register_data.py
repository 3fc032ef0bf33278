"""Register data: create a dataset, and write down ingested bodies as its next version or as a given slice."""

import re
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.artifacts import Artifacts
from service.core.errors import ArtifactMissing, Conflict, InvalidRequest
from service.ingest.documents import HASHES
from service.ingest.ingest import Body, Ingest, Ingested
from service.store import datasets, events, models, updates
from service.store.database import Database, now
from service.store.in_use import share_artifacts
from service.store.tables import Dataset, DataVersion, Slice

# What is looked up while the dataset is locked.
_FEW_DOCUMENTS = 1000
_FEW_VERSIONS = 64

_HOLDOUT_NAME = re.compile(r"v[0-9]+")


@dataclass(frozen=True)
class RegisteredVersion:
    """``created`` is False where the dataset had the same content already."""

    row: DataVersion
    created: bool


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


def register_version(
    database: Database,
    artifacts: Artifacts,
    name: str,
    ingest: Ingest,
    body: Body,
    *,
    label: str | None = None,
) -> RegisteredVersion:
    """Register a body that was ingested to its end, with a pending update of every model that follows.

    Duplicates and holdout depend on the versions and slices that came before. They are worked out and
    published without a lock, which may take minutes; the transaction that writes the row locks the dataset
    and looks whether what came before is still the same. Where it is not, and a look at what was added does not
    show that it changes nothing, they are worked out again: in every round somebody gets ahead.

    Raises NotFound for an unknown dataset, NothingNew where every document is known.
    """
    while True:
        with database.reading() as session:
            dataset = datasets.dataset(session, name)
            # In this order: content that appears in between must not make its own documents known ones.
            known = _known(session, dataset)
            row = datasets.version_by_sha256(session, dataset.id, body.sha256)
        if row is not None:
            return RegisteredVersion(row, created=False)
        ingested = ingest.publish_version(
            earlier=[_folder(artifacts, key) for key in known.version_keys],
            given=[_folder(artifacts, key) for key in known.slice_keys],
            holdout_fraction=dataset.holdout_fraction,
        )
        with database.transaction() as session:
            dataset = datasets.dataset(session, name, lock=True)
            row = datasets.version_by_sha256(session, dataset.id, body.sha256)
            if row is not None:
                return RegisteredVersion(row, created=False)
            present = _known(session, dataset)
            if present != known and not _adds_nothing(artifacts, ingest, body, known, present):
                continue
            if not _holds(session, ingest, ingested):
                continue
            row = DataVersion(
                dataset_id=dataset.id,
                number=datasets.next_number(session, dataset.id),
                label=label,
                sha256=ingested.sha256,
                bytes=ingested.bytes,
                documents=ingested.documents,
                duplicates=ingested.duplicates,
                holdout_documents=ingested.holdout_documents,
                artifact_key=ingested.manifest.key,
                created_at=now(session),
            )
            session.add(row)
            session.flush()
            events.append(session, "data_version.created", dataset=name, data_version=row.number, id=row.id)
            for model in models.following(session, dataset.id):
                updates.add(session, model, row)
            return RegisteredVersion(row, created=True)


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
    if _HOLDOUT_NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} is the name of the holdout of a data version")


def _holds(session: Session, ingest: Ingest, ingested: Ingested) -> bool:
    """Whether what was published is there, and will be until the row says so.

    It may have been found rather than written: left by a registration that died, and old enough to be collected meanwhile.
    """
    share_artifacts(session)
    return ingest.has(ingested)


@dataclass(frozen=True)
class _Known:
    """What decides which documents of a body are new. All of it is immutable, so its keys are enough."""

    version_keys: tuple[str, ...]
    slice_keys: tuple[str, ...]


def _known(session: Session, dataset: Dataset) -> _Known:
    return _Known(
        datasets.version_keys(session, dataset.id),
        tuple(row.artifact_key for row in datasets.given_slices(session, dataset.id)),
    )


def _adds_nothing(artifacts: Artifacts, ingest: Ingest, body: Body, known: _Known, present: _Known) -> bool:
    """Whether only a few versions were added, that have no document of a small body: its division is the same then.

    Looked up under the lock, at about 0.3 ms a version in local files; without it, of many small registrations to one
    dataset at once only one a round would succeed.
    """
    before = len(known.version_keys)
    added = present.version_keys[before:]
    return (
        not artifacts.is_remote  # nobody shall wait for a network under the lock
        and body.documents <= _FEW_DOCUMENTS
        and len(added) <= _FEW_VERSIONS
        and (present.version_keys[:before], present.slice_keys) == (known.version_keys, known.slice_keys)
        and ingest.shares_nothing([_folder(artifacts, key) for key in added])
    )


def _folder(artifacts: Artifacts, key: str) -> Path:
    # Not verified: that would read all data that the dataset has. Whoever packs it verifies it.
    manifest = artifacts.manifest(key)
    if manifest is None:
        raise ArtifactMissing(f"{key}: no such artifact")
    return artifacts.path(manifest, HASHES).parent
