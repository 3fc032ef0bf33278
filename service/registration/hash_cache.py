"""In-memory cache of the document hashes of small data versions.

Without it, every registration would have to open one hash file for each earlier version of the dataset.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from service.artifacts import Artifacts
from service.core.artifact_files import HASHES
from service.core.errors import ArtifactMissing
from service.core.manifest import Manifest
from service.ingest.hash_file import HashFile
from service.store.datasets import DatasetExtent, VersionArtifact

# Larger versions are looked up in their files. A dataset has few of those.
MAX_CACHED_DOCUMENTS = 1000

# In total, at about 200 bytes each.
MAX_HASHES = 1 << 18

# A dataset used this recently is not evicted: two busy datasets would evict each other on every registration.
MIN_KEPT_SECONDS = 60.0


class VersionHashes(NamedTuple):
    """A data version and its artifact. ``hashes`` is None if the version has too many documents to cache."""

    number: int
    key: str
    hashes: Sequence[bytes] | None


@dataclass(frozen=True)
class CachedHashes:
    """The document hashes of a dataset's small versions up to version ``newest``.

    ``uncached`` are the numbers and artifact keys of the other versions up to there. Versions that are added
    to the cache later stay invisible here.
    """

    newest: int
    uncached: tuple[tuple[int, str], ...]
    first_version: dict[bytes, int]

    def among(self, block: Sequence[bytes]) -> set[bytes]:
        """The hashes of a block that are in here."""
        return {digest for digest in block if 0 < self.first_version.get(digest, 0) <= self.newest}


@dataclass
class _Entry:
    """The cached versions of one dataset. ``first_version`` is ordered by version."""

    num_excluded: int
    newest: int = 0
    first_version: dict[bytes, int] = field(default_factory=dict)
    uncached: list[tuple[int, str]] = field(default_factory=list)
    used_at: float = field(default_factory=time.monotonic)


class HashCache:
    """Least-recently-used cache of datasets; one per process, thread-safe.

    Data versions are immutable, so entries only grow. An exclusion resets the entry of its dataset.
    """

    def __init__(self, artifacts: Artifacts, max_hashes: int = MAX_HASHES) -> None:
        self._artifacts = artifacts
        self._max_hashes = max_hashes
        self._num_hashes = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def newest(self, dataset_id: str, extent: DatasetExtent) -> int:
        """The version up to which the dataset is cached; 0 if it is not."""
        with self._lock:
            entry = self._entries.get(dataset_id)
            return entry.newest if entry is not None and entry.num_excluded == extent.excluded else 0

    def read(
        self, dataset_id: str, extent: DatasetExtent, after: int, versions: Iterable[VersionArtifact]
    ) -> CachedHashes | None:
        """Add all versions above ``after`` that are not excluded, in order, reading their artifacts.

        Returns the hashes up to the extent, or None if the cache has moved on to a later exclusion.
        """
        self.add(dataset_id, extent, after, [self._read_hashes(version) for version in versions])
        return self.get(dataset_id, extent)

    def add(
        self, dataset_id: str, extent: DatasetExtent, after: int, versions: Iterable[VersionHashes]
    ) -> None:
        """Add all versions above ``after``, up to the extent, that are not excluded, in order.

        Skips versions that another thread has added in the meantime, and ignores versions that leave a gap.
        """
        with self._lock:
            entry = self._entries.get(dataset_id)
            if entry is None or entry.num_excluded < extent.excluded:
                self._evict(dataset_id)
                entry = self._entries[dataset_id] = _Entry(extent.excluded)
            self._touch(dataset_id)
            if entry.num_excluded != extent.excluded or not after <= entry.newest < extent.newest:
                return
            for number, key, hashes in versions:
                if number <= entry.newest:
                    continue
                if hashes is None or not self._make_room(dataset_id, len(hashes)):
                    entry.uncached.append((number, key))
                    continue
                before = len(entry.first_version)
                for digest in hashes:
                    entry.first_version.setdefault(digest, number)
                self._num_hashes += len(entry.first_version) - before
            entry.newest = extent.newest

    def get(self, dataset_id: str, extent: DatasetExtent) -> CachedHashes | None:
        """The hashes of all versions up to the extent; None if some are not cached."""
        with self._lock:
            entry = self._entries.get(dataset_id)
            if entry is None or entry.num_excluded != extent.excluded or entry.newest < extent.newest:
                return None
            self._touch(dataset_id)
            uncached = tuple(each for each in entry.uncached if each[0] <= extent.newest)
            return CachedHashes(extent.newest, uncached, entry.first_version)

    def added_since(self, dataset_id: str, extent: DatasetExtent, after: int) -> list[bytes] | None:
        """Hashes, sorted, that first appear in a version above ``after`` and up to the extent.

        None if such a version is not cached.
        """
        with self._lock:
            entry = self._entries.get(dataset_id)
            if entry is None or entry.num_excluded != extent.excluded or entry.newest < extent.newest:
                return None
            if any(after < number <= extent.newest for number, _ in entry.uncached):
                return None
            added = []
            for digest, number in reversed(entry.first_version.items()):  # newest first
                if number <= after:
                    break
                if number <= extent.newest:
                    added.append(digest)
            return sorted(added)

    def folder(self, key: str) -> Path:
        """The folder that has the hash file of an artifact."""
        return self._artifacts.path(self._manifest(key), HASHES).parent

    def _read_hashes(self, version: VersionArtifact) -> VersionHashes:
        if version.documents > MAX_CACHED_DOCUMENTS:
            return VersionHashes(version.number, version.key, None)
        with HashFile(self._artifacts.read(self._manifest(version.key), HASHES)) as hashes:
            return VersionHashes(version.number, version.key, list(hashes))

    def _manifest(self, key: str) -> Manifest:
        # Not verified, which would read all data of the dataset. The pack stage verifies what it reads.
        manifest = self._artifacts.manifest(key)
        if manifest is None:
            raise ArtifactMissing(f"{key}: no such artifact")
        return manifest

    def _make_room(self, dataset_id: str, num_hashes: int) -> bool:
        """Evict other datasets until that many hashes fit. False if that takes one that is in use."""
        while self._num_hashes + num_hashes > self._max_hashes:
            oldest = next(iter(self._entries))
            if oldest == dataset_id or time.monotonic() - self._entries[oldest].used_at < MIN_KEPT_SECONDS:
                return False
            self._evict(oldest)
        return True

    def _touch(self, dataset_id: str) -> None:
        self._entries[dataset_id].used_at = time.monotonic()
        self._entries.move_to_end(dataset_id)

    def _evict(self, dataset_id: str) -> None:
        entry = self._entries.pop(dataset_id, None)
        if entry is not None:
            self._num_hashes -= len(entry.first_version)
