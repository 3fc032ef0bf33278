"""Datasets, their data versions and their given slices."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.artifact_files import DOCUMENTS, HOLDOUT
from service.core.errors import NotFound
from service.core.plan import DataRef
from service.core.stage_specs import SliceRef, holdout_name
from service.store.paging import page
from service.store.tables import Dataset, DataVersion, Slice

# Written once, because every registration asks them, and to write one takes as long as to have it answered.
_OF_DATASET = DataVersion.dataset_id == Dataset.id
_EXTENT = (
    sa.select(sa.func.coalesce(sa.func.max(DataVersion.number), 0)).where(_OF_DATASET).scalar_subquery(),
    sa.select(sa.func.count()).where(_OF_DATASET, DataVersion.excluded_at.is_not(None)).scalar_subquery(),
    sa.select(sa.func.count()).where(Slice.dataset_id == Dataset.id).scalar_subquery(),
)
_INSERT = sa.insert(cast(sa.Table, DataVersion.__table__))
_IDS: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)
_EXTENTS = sa.select(Dataset.id, *_EXTENT).where(Dataset.id.in_(_IDS))
_LOCKED = sa.select(Dataset.id).where(Dataset.id.in_(_IDS)).order_by(Dataset.id).with_for_update()
_STANDING = sa.select(
    Dataset.id,
    Dataset.holdout_fraction,
    sa.exists().where(_OF_DATASET, DataVersion.sha256 == sa.bindparam("sha256")),
    *_EXTENT,
).where(Dataset.name == sa.bindparam("name"))
_OF_CONTENTS = sa.select(DataVersion).where(
    sa.tuple_(DataVersion.dataset_id, DataVersion.sha256).in_(sa.bindparam("contents", expanding=True))
)


def dataset(session: Session, name: str, *, lock: bool = False) -> Dataset:
    """The dataset of that name, locked against other writers on request. Raises NotFound."""
    query = sa.select(Dataset).where(Dataset.name == name)
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFound(f"no dataset {name!r}")
    return row


def lock_all(session: Session, dataset_ids: Collection[str]) -> None:
    """Lock datasets against other writers, in one order for all who lock more than one."""
    if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer at a time anyway
        session.execute(_LOCKED, {"ids": list(dataset_ids)}).all()


class Extent(NamedTuple):
    """How much a dataset has: the number of its newest version, and how many excluded versions and given slices.

    Nothing is ever removed, changed, or excluded no longer: of equal extents the content is equal.
    """

    newest: int
    excluded: int
    slices: int


class Standing(NamedTuple):
    """Where a dataset stands when a body comes. ``is_there``: whether it has the body's content already."""

    dataset_id: str
    holdout_fraction: float
    is_there: bool
    extent: Extent


def standing(session: Session, name: str, sha256: str) -> Standing:
    """Raises NotFound."""
    row = session.execute(_STANDING, {"name": name, "sha256": sha256}).one_or_none()
    if row is None:
        raise NotFound(f"no dataset {name!r}")
    dataset_id, holdout_fraction, is_there, *extent = row
    return Standing(dataset_id, holdout_fraction, is_there, Extent(*extent))


def extents(session: Session, dataset_ids: Collection[str]) -> dict[str, Extent]:
    """Dataset id -> how much it has."""
    rows = session.execute(_EXTENTS, {"ids": list(dataset_ids)})
    return {dataset_id: Extent(*extent) for dataset_id, *extent in rows}


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
    """The data versions that are not excluded in order of number, up to ``up_to`` inclusive."""
    query = sa.select(DataVersion).where(
        DataVersion.dataset_id == dataset_id, DataVersion.excluded_at.is_(None)
    )
    if up_to is not None:
        query = query.where(DataVersion.number <= up_to)
    return session.scalars(query.order_by(DataVersion.number)).all()


def add_versions(session: Session, rows: Sequence[DataVersion]) -> None:
    """Write down rows that have all of their values. They are not the session's: what it would do for each is not needed."""
    columns = DataVersion.__table__.columns.keys()
    session.execute(_INSERT, [{name: getattr(row, name) for name in columns} for row in rows])


class VersionArtifact(NamedTuple):
    number: int
    key: str
    documents: int


def version_artifacts(session: Session, dataset_id: str, after: int) -> list[VersionArtifact]:
    """Of the data versions above ``after`` that are not excluded, in order of number, without the cost of their rows."""
    query = sa.select(DataVersion.number, DataVersion.artifact_key, DataVersion.documents).where(
        DataVersion.dataset_id == dataset_id, DataVersion.number > after, DataVersion.excluded_at.is_(None)
    )
    return [VersionArtifact(*row) for row in session.execute(query.order_by(DataVersion.number))]


def versions_by_sha256(
    session: Session, contents: Collection[tuple[str, str]]
) -> dict[tuple[str, str], DataVersion]:
    """Those data versions that there are of these contents, each the id of a dataset and a sha256."""
    rows = session.scalars(_OF_CONTENTS, {"contents": list(contents)})
    return {(row.dataset_id, row.sha256): row for row in rows}


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
    """Dataset id -> number of its newest data version, for those that have one."""
    query = (
        sa.select(DataVersion.dataset_id, sa.func.max(DataVersion.number))
        .where(DataVersion.dataset_id.in_(dataset_ids))
        .group_by(DataVersion.dataset_id)
    )
    return {row[0]: row[1] for row in session.execute(query)}


def given_slice(session: Session, dataset_id: str, name: str) -> Slice | None:
    return session.scalar(sa.select(Slice).where(Slice.dataset_id == dataset_id, Slice.name == name))


def given_slices(session: Session, dataset_id: str) -> Sequence[Slice]:
    """The given evaluation sets, oldest first."""
    return session.scalars(sa.select(Slice).where(Slice.dataset_id == dataset_id).order_by(Slice.id)).all()


def ledger_data(session: Session, dataset_id: str, up_to: int) -> list[DataRef]:
    """What planning needs to know of the data versions up to ``up_to``."""
    return [DataRef(number=row.number, key=row.artifact_key) for row in versions(session, dataset_id, up_to)]


def slice_refs(session: Session, dataset_id: str, up_to: int) -> list[SliceRef]:
    """Every evaluation set that concerns the data versions up to ``up_to``: their holdouts, then given slices."""
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
    for row in given_slices(session, dataset_id):
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
