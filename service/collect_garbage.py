"""Collect garbage: remove artifacts that no row needs any more, and what attempts that died have left behind.

An artifact goes in two steps: its manifest in a transaction in which nobody can begin to refer to it, and then its files. A
process that dies in between leaves files that belong to no manifest, which the next collection finds.
"""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from service.artifact_cache import ATTEMPT_DIRECTORY
from service.artifacts import Artifacts, StoredFile
from service.core.errors import ArtifactCorrupt
from service.core.manifest import MANIFEST
from service.store.database import Database
from service.store.in_use import InUse, artifacts_in_use, stop_sharing_artifacts

# Their manifests are removed while nobody may begin to refer to any: few enough to be a moment.
_BATCH = 500


class Reason(StrEnum):
    UNUSED = "unused"
    """No row needs the artifact any more."""
    LEFT_BEHIND = "left behind"
    """Files of an attempt that published nothing, or came second."""


@dataclass(frozen=True)
class Garbage:
    """What may go: a whole artifact, or files under its key that are not of it."""

    key: str
    reason: Reason
    paths: tuple[str, ...]
    bytes: int


@dataclass
class _Stored:
    """What lies under one key: the manifest, and files by the directory of the attempt that wrote them."""

    manifest: StoredFile | None = None
    attempts: dict[str, list[StoredFile]] = field(default_factory=dict)


def find_garbage(
    database: Database, artifacts: Artifacts, *, older_than_seconds: float, keep_versions: int | None = None
) -> list[Garbage]:
    """What a collection would remove. Nothing written since ``older_than_seconds`` is: it may be of something under way.

    ``keep_versions``: see ``artifacts_in_use``. Raises Unavailable.
    """
    before = time.time() - older_than_seconds
    stored = _by_key(artifacts.files())
    # After the files: what was written and referred to in between is found in use.
    with database.reading() as session:
        in_use = artifacts_in_use(session, keep_versions)
    found: list[Garbage] = []
    for key in sorted(stored):
        found.extend(_garbage_under(key, stored[key], in_use, before, artifacts))
    return found


def remove_garbage(
    database: Database, artifacts: Artifacts, found: Sequence[Garbage], *, keep_versions: int | None = None
) -> list[Garbage]:
    """Remove what ``find_garbage`` found, as far as it still is garbage. Returns what was removed."""
    removed: list[Garbage] = []
    for start in range(0, len(found), _BATCH):
        batch = found[start : start + _BATCH]
        unused = [item for item in batch if item.reason == Reason.UNUSED]
        if unused:
            with database.transaction() as session:
                stop_sharing_artifacts(session)
                in_use = artifacts_in_use(session, keep_versions)
                unused = [item for item in unused if item.key not in in_use]
                artifacts.unpublish([item.key for item in unused])
        left_behind = [item for item in batch if item.reason == Reason.LEFT_BEHIND]
        gone = [*unused, *(item for item in left_behind if not _is_published(item, artifacts))]
        artifacts.remove_files([path for item in gone for path in item.paths])
        removed.extend(gone)
    return removed


def kinds(found: Iterable[Garbage]) -> list[tuple[Reason, str, int, int]]:
    """Reason, first part of the key, how many and how many bytes: what a person reads before deleting."""
    counts, sizes = Counter[tuple[Reason, str]](), Counter[tuple[Reason, str]]()
    for item in found:
        at = item.reason, item.key.partition("/")[0]
        counts[at] += 1
        sizes[at] += item.bytes
    return [(reason, kind, counts[reason, kind], sizes[reason, kind]) for reason, kind in sorted(counts)]


def _garbage_under(
    key: str, stored: _Stored, in_use: InUse, before: float, artifacts: Artifacts
) -> Iterable[Garbage]:
    published = stored.manifest
    if published is not None and published.modified < before and key not in in_use:
        every = [file for files in stored.attempts.values() for file in files]
        yield _garbage(key, Reason.UNUSED, every, more=published.bytes)
        return
    attempts = dict(stored.attempts)
    if published is not None:
        if not attempts or (artifacts.is_remote and len(attempts) == 1):
            return  # of an object store the one is that of the manifest, which it would cost a request to ask
        try:
            manifest = artifacts.manifest(key)
        except ArtifactCorrupt:
            return  # which of them it was written for nobody knows
        if manifest is None or (attempts.pop(manifest.directory, None) is None and not manifest.is_whole):
            return
    for files in attempts.values():
        if max(file.modified for file in files) < before:
            yield _garbage(key, Reason.LEFT_BEHIND, files)


def _is_published(item: Garbage, artifacts: Artifacts) -> bool:
    """Whether an attempt that had been silent for so long has published after all."""
    try:
        manifest = artifacts.manifest(item.key)
    except ArtifactCorrupt:
        return True  # perhaps of these files
    return manifest is not None and item.paths[0].startswith(f"{item.key}/{manifest.directory}/")


def _garbage(key: str, reason: Reason, files: Sequence[StoredFile], more: int = 0) -> Garbage:
    paths = tuple(file.path for file in files)
    return Garbage(key, reason, paths, more + sum(file.bytes for file in files))


def _by_key(files: Iterable[StoredFile]) -> dict[str, _Stored]:
    """Sort files by artifact. Files that lie as none of ours would are nobody's garbage, and left out."""
    stored: dict[str, _Stored] = {}
    for file in files:
        parts = file.path.split("/")
        attempt = next((place for place, part in enumerate(parts) if ATTEMPT_DIRECTORY.fullmatch(part)), None)
        if attempt is not None:
            under = stored.setdefault("/".join(parts[:attempt]), _Stored())
            under.attempts.setdefault(parts[attempt], []).append(file)
        elif parts[-1] == MANIFEST:
            stored.setdefault("/".join(parts[:-1]), _Stored()).manifest = file
        elif parts[-1].startswith(f".{MANIFEST}-"):
            under = stored.setdefault("/".join(parts[:-1]), _Stored())
            under.attempts.setdefault(parts[-1], []).append(file)
    return stored
