"""Garbage collection: removes artifacts that no row needs, and files of attempts that never published.

An unused artifact is removed in two steps: first its manifest, in a transaction during which no other process can start
to use it, and then its files. If the process dies in between, the next collection finds the orphaned files.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from service.artifacts import Artifacts
from service.artifacts.layout import StoredFile, directory_path, split_path
from service.core.errors import ArtifactCorrupt
from service.store.database import Database
from service.store.in_use import InUse, artifacts_in_use, lock_artifacts_for_removal

# Manifests are unpublished while other processes wait to use artifacts: few enough to keep the wait short.
_BATCH_ITEMS = 500


class Reason(StrEnum):
    UNUSED = "unused"
    """No row needs the artifact any more."""
    LEFT_BEHIND = "left behind"
    """An attempt wrote the files but died, or lost the race to publish."""


@dataclass(frozen=True)
class Garbage:
    """A whole artifact, or orphaned files under its key. ``paths`` leaves the manifest out."""

    key: str
    reason: Reason
    paths: tuple[str, ...]
    bytes: int


@dataclass
class _StoredArtifact:
    """The files under one key: the manifest, and the others by the attempt that wrote them."""

    manifest: StoredFile | None = None
    attempts: dict[str, list[StoredFile]] = field(default_factory=dict)


def find_garbage(
    database: Database, artifacts: Artifacts, *, older_than_seconds: float, keep_versions: int | None = None
) -> list[Garbage]:
    """List what a collection would remove. Spares all files written in the last ``older_than_seconds``.

    A running stage may still need those. For ``keep_versions`` see ``artifacts_in_use``. Raises Unavailable.
    """
    before = time.time() - older_than_seconds
    stored = _by_key(artifacts.files())
    # Read the rows after the files: an artifact that was published and used in between then counts as used.
    with database.reading() as session:
        in_use = artifacts_in_use(session, keep_versions)
    garbage: list[Garbage] = []
    for key in sorted(stored):
        garbage.extend(_garbage_under(key, stored[key], in_use, before, artifacts))
    return garbage


def remove_garbage(
    database: Database, artifacts: Artifacts, garbage: Sequence[Garbage], *, keep_versions: int | None = None
) -> list[Garbage]:
    """Remove what ``find_garbage`` listed, except what has come into use since. Returns what was removed."""
    removed: list[Garbage] = []
    for start in range(0, len(garbage), _BATCH_ITEMS):
        batch = garbage[start : start + _BATCH_ITEMS]
        unused = [item for item in batch if item.reason == Reason.UNUSED]
        if unused:
            with database.transaction() as session:
                lock_artifacts_for_removal(session)
                in_use = artifacts_in_use(session, keep_versions)
                unused = [item for item in unused if item.key not in in_use]
                artifacts.unpublish([item.key for item in unused])
        left_behind = [item for item in batch if item.reason == Reason.LEFT_BEHIND]
        removable = [*unused, *(item for item in left_behind if not _may_be_published(item, artifacts))]
        artifacts.remove_files([path for item in removable for path in item.paths])
        removed.extend(removable)
    return removed


def summarize(garbage: Iterable[Garbage]) -> list[tuple[Reason, str, int, int]]:
    """Garbage grouped by reason and artifact kind: reason, kind, count, bytes."""
    counts, sizes = Counter[tuple[Reason, str]](), Counter[tuple[Reason, str]]()
    for item in garbage:
        group = item.reason, item.key.partition("/")[0]
        counts[group] += 1
        sizes[group] += item.bytes
    return [(reason, kind, counts[reason, kind], sizes[reason, kind]) for reason, kind in sorted(counts)]


def _garbage_under(
    key: str, stored: _StoredArtifact, in_use: InUse, before: float, artifacts: Artifacts
) -> Iterator[Garbage]:
    published = stored.manifest
    if published is not None and published.modified < before and key not in in_use:
        files = [file for attempt_files in stored.attempts.values() for file in attempt_files]
        yield _garbage(key, Reason.UNUSED, files, manifest_bytes=published.bytes)
        return
    orphans = stored.attempts if published is None else _attempts_beside_manifest(key, stored, artifacts)
    for files in orphans.values():
        if max(file.modified for file in files) < before:
            yield _garbage(key, Reason.LEFT_BEHIND, files)


def _attempts_beside_manifest(
    key: str, stored: _StoredArtifact, artifacts: Artifacts
) -> dict[str, list[StoredFile]]:
    """The attempts under a published key that its manifest does not name; none where that is uncertain."""
    attempts = dict(stored.attempts)
    if not attempts or (artifacts.is_remote and len(attempts) == 1):
        return {}  # a single attempt in an object store is almost always the published one: save the request
    try:
        manifest = artifacts.manifest(key)
    except ArtifactCorrupt:
        return {}
    if manifest is None:
        return {}
    published_files = attempts.pop(manifest.directory, None)
    return attempts if published_files is not None or manifest.is_inlined else {}


def _may_be_published(item: Garbage, artifacts: Artifacts) -> bool:
    """Whether the attempt has published since it was listed."""
    try:
        manifest = artifacts.manifest(item.key)
    except ArtifactCorrupt:
        return True
    return manifest is not None and item.paths[0].startswith(f"{directory_path(manifest)}/")


def _garbage(key: str, reason: Reason, files: Sequence[StoredFile], manifest_bytes: int = 0) -> Garbage:
    paths = tuple(file.path for file in files)
    return Garbage(key, reason, paths, manifest_bytes + sum(file.bytes for file in files))


def _by_key(files: Iterable[StoredFile]) -> dict[str, _StoredArtifact]:
    """Group files by artifact. Files outside the layout are not ours and are never removed."""
    by_key: dict[str, _StoredArtifact] = {}
    for file in files:
        owner = split_path(file.path)
        if owner is None:
            continue
        key, attempt = owner
        stored = by_key.setdefault(key, _StoredArtifact())
        if attempt is None:
            stored.manifest = file
        else:
            stored.attempts.setdefault(attempt, []).append(file)
    return by_key
