"""What the versions of a dataset have: the hashes of small ones in memory, of the others the folders that have them."""

from collections.abc import Sequence
from pathlib import Path

from sqlalchemy.orm import Session

from service.artifacts import Artifacts
from service.core.artifact_files import HASHES
from service.core.errors import ArtifactMissing
from service.core.manifest import Manifest
from service.ingest.hash_memory import SMALL_DOCUMENTS, HashMemory, Remembered, VersionHashes
from service.ingest.hashfile import HashFile
from service.store import datasets
from service.store.datasets import Extent, VersionArtifact

# What is looked up while the dataset is locked; of an object store, each is a request.
_FEW_VERSIONS = 64
_FEW_REMOTE_VERSIONS = 8


class KnownDocuments:
    """The memory, and what fills it. For several threads at once."""

    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts
        self._memory = HashMemory()

    def now(self, dataset_id: str, extent: Extent) -> Remembered | None:
        """What is known without asking anybody; None where that is not all of the dataset."""
        return self._memory.remembered(dataset_id, extent.excluded, extent.newest)

    def newest(self, dataset_id: str, extent: Extent) -> int:
        """Up to which version of the dataset is known; 0 where it is not."""
        return self._memory.newest(dataset_id, extent.excluded)

    def with_added(
        self, dataset_id: str, extent: Extent, after: int, added: Sequence[VersionArtifact]
    ) -> Remembered | None:
        """Read what was added to a dataset above ``after``. None where others were faster, or have excluded a version."""
        versions = [VersionHashes(each.number, each.key, self._few_hashes(each)) for each in added]
        self._memory.add(dataset_id, extent.excluded, after, extent.newest, versions)
        return self.now(dataset_id, extent)

    def add(self, dataset_id: str, extent: Extent, version: VersionHashes) -> None:
        """Add a version that has just been written down."""
        self._memory.add(dataset_id, extent.excluded, version.number - 1, version.number, [version])

    def at_hand(self, session: Session, dataset_id: str, extent: Extent) -> Remembered | None:
        """What the versions of a dataset have, where it can be told while the dataset is locked."""
        after = self.newest(dataset_id, extent)
        if after >= extent.newest:
            return self.now(dataset_id, extent)
        if extent.newest - after > (_FEW_REMOTE_VERSIONS if self._artifacts.is_remote else _FEW_VERSIONS):
            return None
        return self.with_added(
            dataset_id, extent, after, datasets.version_artifacts(session, dataset_id, after)
        )

    def _few_hashes(self, version: VersionArtifact) -> list[bytes] | None:
        if version.documents > SMALL_DOCUMENTS:
            return None
        with HashFile(self._artifacts.read(self._manifest(version.key), HASHES)) as hashes:
            return list(hashes)

    def folder(self, key: str) -> Path:
        """Where the hashes of an artifact lie."""
        return self._artifacts.path(self._manifest(key), HASHES).parent

    def _manifest(self, key: str) -> Manifest:
        # Not verified: that would read all data that the dataset has. Whoever packs it verifies it.
        manifest = self._artifacts.manifest(key)
        if manifest is None:
            raise ArtifactMissing(f"{key}: no such artifact")
        return manifest
