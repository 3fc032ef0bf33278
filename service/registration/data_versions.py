"""Registers ingested bodies as the next data versions of their datasets.

Duplicates and the holdout of a version depend on the versions and slices before it. A registration reads a
snapshot of the dataset, then splits and publishes the body without a lock, because that can take minutes. The
transaction that writes the row locks the dataset and checks that the split still holds. If it does not, the
registration starts again; each time, another registration has succeeded.
"""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.ingest.ingest import Body, Ingest, Ingested
from service.registration.hash_cache import MAX_CACHED_DOCUMENTS, HashCache, VersionHashes
from service.store import datasets, events, models, updates
from service.store.columns import new_id
from service.store.database import Database
from service.store.datasets import DatasetExtent, DatasetSnapshot
from service.store.in_use import share_artifacts
from service.store.tables import DataVersion

# Versions whose hashes are read while the dataset is locked. In an object store each read is a request.
_MAX_READ_UNDER_LOCK = 16


@dataclass(frozen=True)
class RegisteredVersion:
    """``created`` is False if the dataset already had the content. ``updates`` are ids, oldest first."""

    row: DataVersion
    created: bool
    updates: list[str]


class _SplitOutdated(Exception):
    """The dataset has changed in a way that may change the split, or the published artifact was collected."""


def register_version(
    database: Database,
    cache: HashCache,
    dataset_name: str,
    ingest: Ingest,
    body: Body,
    *,
    label: str | None = None,
) -> RegisteredVersion:
    """Register an ended body, with a pending update for every model that follows the dataset.

    Raises NotFound for an unknown dataset, NothingNew if the dataset already has every document.
    """
    while True:
        # Read everything from one snapshot; otherwise a version with the same content, registered between two
        # reads, would make all of the body's documents look like duplicates.
        with database.reading() as session:
            snapshot = datasets.snapshot(session, dataset_name)
            dataset_id, extent = snapshot.dataset_id, snapshot.extent
            existing = _find(session, dataset_id, body.sha256)
            if existing is not None:
                return existing
            slices = datasets.uploaded_slices(session, dataset_id) if extent.slices else ()
            after = cache.newest(dataset_id, extent)
            added = datasets.version_artifacts(session, dataset_id, after) if extent.newest > after else []
        cached = cache.read(dataset_id, extent, after, added)
        if cached is None:
            continue
        ingested = ingest.publish_version(
            earlier=[cache.folder(key) for _, key in cached.uncached],
            uploaded=[cache.folder(row.artifact_key) for row in slices],
            holdout_fraction=snapshot.holdout_fraction,
            cached=cached,
        )
        try:
            return _write(database, cache, dataset_name, snapshot, ingest, ingested, label)
        except _SplitOutdated:
            continue


def _write(
    database: Database,
    cache: HashCache,
    dataset_name: str,
    snapshot: DatasetSnapshot,
    ingest: Ingest,
    ingested: Ingested,
    label: str | None,
) -> RegisteredVersion:
    """Write the row, its event and its updates. Raises _SplitOutdated, and writes nothing."""
    dataset_id = snapshot.dataset_id
    with database.transaction() as session:
        datasets.dataset(session, dataset_name, lock=True)
        created_at = share_artifacts(session)
        existing = _find(session, dataset_id, ingested.sha256)
        if existing is not None:
            return existing
        extent = datasets.extent(session, dataset_id)
        if not _split_holds(session, cache, snapshot, extent, ingest, ingested):
            raise _SplitOutdated
        row = DataVersion(
            id=new_id("dv"),
            dataset_id=dataset_id,
            number=extent.newest + 1,
            label=label,
            sha256=ingested.sha256,
            bytes=ingested.bytes,
            documents=ingested.documents,
            duplicates=ingested.duplicates,
            holdout_documents=ingested.holdout_documents,
            artifact_key=ingested.manifest.key,
            created_at=created_at,
        )
        session.add(row)
        session.flush()
        events.append(
            session, "data_version.created", dataset=dataset_name, data_version=row.number, id=row.id
        )
        following = models.following(session, [dataset_id])[dataset_id]
        update_ids = [updates.add(session, model, row).id for model in following]
    _add_to_cache(cache, row, extent, ingest, ingested)
    return RegisteredVersion(row, True, update_ids)


def _find(session: Session, dataset_id: str, sha256: str) -> RegisteredVersion | None:
    row = datasets.version_by_sha256(session, dataset_id, sha256)
    if row is None:
        return None
    update_ids = updates.ids_by_data_version(session, [row.id])
    return RegisteredVersion(row, False, update_ids.get(row.id, []))


def _split_holds(
    session: Session,
    cache: HashCache,
    snapshot: DatasetSnapshot,
    extent: DatasetExtent,
    ingest: Ingest,
    ingested: Ingested,
) -> bool:
    """Whether the published split is still right, and its artifact still exists.

    The split stays valid if the dataset has gained only small versions that share no document with the body.
    """
    # The artifact may have been left by a registration that died, and garbage-collected since.
    if not ingest.is_published(ingested):
        return False
    dataset_id, seen = snapshot.dataset_id, snapshot.extent
    if extent == seen:
        return True
    if (extent.excluded, extent.slices) != (seen.excluded, seen.slices):
        return False
    after = cache.newest(dataset_id, extent)
    if extent.newest - after > _MAX_READ_UNDER_LOCK:
        return False
    if extent.newest > after:
        cache.read(dataset_id, extent, after, datasets.version_artifacts(session, dataset_id, after))
    added = cache.added_since(dataset_id, extent, seen.newest)
    if added is None:
        return False
    with ingest.open_hashes(ingested) as hashes:
        return not hashes.among(added)


def _add_to_cache(
    cache: HashCache, row: DataVersion, extent: DatasetExtent, ingest: Ingest, ingested: Ingested
) -> None:
    hashes = None
    if row.documents <= MAX_CACHED_DOCUMENTS:
        with ingest.open_hashes(ingested) as published:
            hashes = list(published)
    version = VersionHashes(row.number, row.artifact_key, hashes)
    cache.add(row.dataset_id, extent._replace(newest=row.number), extent.newest, [version])
