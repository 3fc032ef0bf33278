"""Datasets, their data versions and their uploaded slices."""

from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.artifact_files import DOCUMENTS, HOLDOUT
from service.core.errors import NotFound
from service.core.plan import DataRef
from service.core.stage_specs import SliceRef, holdout_name
from service.store.paging import page
from service.store.tables import Dataset, DataVersion, Slice

# Every registration runs these queries; building one takes as long as executing it.
_IN_DATASET = DataVersion.dataset_id == Dataset.id
_EXTENT = (
    sa.select(sa.func.coalesce(sa.func.max(DataVersion.number), 0)).where(_IN_DATASET).scalar_subquery(),
    sa.select(sa.func.count()).where(_IN_DATASET, DataVersion.excluded_at.is_not(None)).scalar_subquery(),
    sa.select(sa.func.count()).where(Slice.dataset_id == Dataset.id).scalar_subquery(),
)
_EXTENT_BY_ID = sa.select(*_EXTENT).where(Dataset.id == sa.bindparam("dataset_id"))
_SNAPSHOT_BY_NAME = sa.select(Dataset.id, Dataset.holdout_fraction, *_EXTENT).where(
    Dataset.name == sa.bindparam("name")
)


class DatasetExtent(NamedTuple):
    """How much a dataset contains: its newest version, and counts of excluded versions and uploaded slices.

    Versions and slices are never removed or changed, and exclusions never revoked, so equal extents of a
    dataset mean equal content.
    """

    newest: int
    excluded: int
    slices: int


class DatasetSnapshot(NamedTuple):
    """A dataset at one point in time."""

    dataset_id: str
    holdout_fraction: float
    extent: DatasetExtent


def dataset(session: Session, name: str, *, lock: bool = False) -> Dataset:
    """The dataset with that name, optionally locked against other writers. Raises NotFound."""
    query = sa.select(Dataset).where(Dataset.name == name)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFound(f"no dataset {name!r}")
    return row


def snapshot(session: Session, name: str) -> DatasetSnapshot:
    """Raises NotFound."""
    row = session.execute(_SNAPSHOT_BY_NAME, {"name": name}).one_or_none()
    if row is None:
        raise NotFound(f"no dataset {name!r}")
    dataset_id, holdout_fraction, *extent_columns = row
    return DatasetSnapshot(dataset_id, holdout_fraction, DatasetExtent(*extent_columns))


def extent(session: Session, dataset_id: str) -> DatasetExtent:
    return DatasetExtent(*session.execute(_EXTENT_BY_ID, {"dataset_id": dataset_id}).one())


def by_id(session: Session, dataset_id: str) -> Dataset:
    row = session.get(Dataset, dataset_id)
    assert row is not None
    return row


def version(session: Session, dataset_id: str, number: int) -> DataVersion:
    """Data version ``number``. Raises NotFound."""
    row = session.scalar(
        sa.select(DataVersion).where(DataVersion.dataset_id == dataset_id, DataVersion.number == number)
    )
    if row is None:
        raise NotFound(f"no data version {number}")
    return row


def version_by_id(session: Session, version_id: str) -> DataVersion:
    row = session.get(DataVersion, version_id)
    assert row is not None
    return row


def versions(session: Session, dataset_id: str, up_to: int | None = None) -> Sequence[DataVersion]:
    """The data versions that are not excluded, in order, up to and including number ``up_to``."""
    query = sa.select(DataVersion).where(
        DataVersion.dataset_id == dataset_id, DataVersion.excluded_at.is_(None)
    )
    if up_to is not None:
        query = query.where(DataVersion.number <= up_to)
    return session.scalars(query.order_by(DataVersion.number)).all()


class VersionArtifact(NamedTuple):
    number: int
    key: str
    documents: int


def version_artifacts(session: Session, dataset_id: str, after: int) -> list[VersionArtifact]:
    """Artifacts of the data versions above ``after`` that are not excluded, in order."""
    query = sa.select(DataVersion.number, DataVersion.artifact_key, DataVersion.documents).where(
        DataVersion.dataset_id == dataset_id, DataVersion.number > after, DataVersion.excluded_at.is_(None)
    )
    return [VersionArtifact(*row) for row in session.execute(query.order_by(DataVersion.number))]


def version_by_sha256(session: Session, dataset_id: str, sha256: str) -> DataVersion | None:
    """The data version with that content."""
    return session.scalar(
        sa.select(DataVersion).where(DataVersion.dataset_id == dataset_id, DataVersion.sha256 == sha256)
    )


def versions_by_id(session: Session, version_ids: Sequence[str]) -> dict[str, DataVersion]:
    rows = session.scalars(sa.select(DataVersion).where(DataVersion.id.in_(version_ids)))
    return {row.id: row for row in rows}


def excluded_numbers(session: Session, dataset_id: str) -> frozenset[int]:
    query = sa.select(DataVersion.number).where(
        DataVersion.dataset_id == dataset_id, DataVersion.excluded_at.is_not(None)
    )
    return frozenset(session.scalars(query))


def newest_version(session: Session, dataset_id: str) -> DataVersion | None:
    """The newest data version that is not excluded."""
    return session.scalar(
        sa.select(DataVersion)
        .where(DataVersion.dataset_id == dataset_id, DataVersion.excluded_at.is_(None))
        .order_by(DataVersion.number.desc())
        .limit(1)
    )


def page_of_datasets(session: Session, after: str | None, limit: int) -> tuple[Sequence[Dataset], bool]:
    return page(session, sa.select(Dataset), Dataset.id, after, limit)


def page_of_versions(
    session: Session, dataset_id: str, after: str | None, limit: int
) -> tuple[Sequence[DataVersion], bool]:
    query = sa.select(DataVersion).where(DataVersion.dataset_id == dataset_id)
    return page(session, query, DataVersion.number, after, limit)


def page_of_slices(
    session: Session, dataset_id: str, after: str | None, limit: int
) -> tuple[Sequence[Slice], bool]:
    return page(session, sa.select(Slice).where(Slice.dataset_id == dataset_id), Slice.id, after, limit)


def newest_numbers(session: Session, dataset_ids: Sequence[str]) -> dict[str, int]:
    """Dataset id -> number of its newest data version, for the datasets that have one."""
    query = (
        sa.select(DataVersion.dataset_id, sa.func.max(DataVersion.number))
        .where(DataVersion.dataset_id.in_(dataset_ids))
        .group_by(DataVersion.dataset_id)
    )
    return {row[0]: row[1] for row in session.execute(query)}


def uploaded_slice(session: Session, dataset_id: str, name: str) -> Slice | None:
    return session.scalar(sa.select(Slice).where(Slice.dataset_id == dataset_id, Slice.name == name))


def uploaded_slices(session: Session, dataset_id: str) -> Sequence[Slice]:
    """The uploaded evaluation sets, oldest first."""
    return session.scalars(sa.select(Slice).where(Slice.dataset_id == dataset_id).order_by(Slice.id)).all()


def ledger_data(session: Session, dataset_id: str, up_to: int) -> list[DataRef]:
    """References to the data versions up to ``up_to``, as planning takes them."""
    return [DataRef(number=row.number, key=row.artifact_key) for row in versions(session, dataset_id, up_to)]


def slice_refs(session: Session, dataset_id: str, up_to: int) -> list[SliceRef]:
    """Evaluation sets for the data versions up to ``up_to``: their holdouts, then the uploaded slices."""
    refs = [
        SliceRef(
            name=holdout_name(row.number),
            key=row.artifact_key,
            file=HOLDOUT,
            data_version=row.number,
        )
        for row in versions(session, dataset_id, up_to)
        if row.holdout_documents
    ]
    for row in uploaded_slices(session, dataset_id):
        if row.data_version is None or row.data_version <= up_to:
            refs.append(
                SliceRef(
                    name=row.name,
                    key=row.artifact_key,
                    file=DOCUMENTS,
                    data_version=row.data_version,
                )
            )
    return refs
