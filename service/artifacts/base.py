"""The interface of an artifact store, and the code that its two implementations share."""

import hashlib
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from service.artifacts.disk_space import translate_disk_full
from service.artifacts.files import hash_and_sync, is_intact, remove_if_empty
from service.artifacts.layout import (
    StoredFile,
    check_key,
    directory_path,
    file_path,
    manifest_path,
    new_attempt_directory,
)
from service.core.errors import ArtifactCorrupt, ArtifactMissing
from service.core.manifest import FileEntry, Manifest


class Artifacts(ABC):
    """Immutable artifacts under keys such as ``pack/3f9c…``.

    Attempts are written, and files are read, below the local folder ``root``. Every method may raise Unavailable if the
    artifacts are in an object store.
    """

    is_remote: ClassVar[bool]
    """Whether a look-up may cost a network request."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def from_url(cls, url: str) -> "Artifacts":
        """Kept through 0.3: ranks of 0.2's training jobs open the store with it. Use ``open_artifacts``."""
        from service.artifacts import open_artifacts

        return open_artifacts(url)

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL with which another process opens the same artifacts."""

    def check(self) -> None:
        """Raise OSError or Unavailable unless the store is writable."""
        self.root.mkdir(parents=True, exist_ok=True)
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()

    # --- look up ---

    def manifest(self, key: str) -> Manifest | None:
        """The manifest under ``key``, or None if there is no such artifact. Raises ArtifactCorrupt."""
        raw = self._read_manifest(key)
        if raw is None:
            return None
        try:
            return Manifest.model_validate_json(raw)
        except ValueError as error:
            raise ArtifactCorrupt(f"{key}: unreadable manifest") from error

    def exists(self, key: str) -> bool:
        """Whether an artifact is published under ``key``."""
        return self._read_manifest(key) is not None

    @abstractmethod
    def keys(self, prefix: str) -> list[str]:
        """The keys of the published artifacts exactly one level below ``prefix``, sorted."""

    @abstractmethod
    def location(self, manifest: Manifest) -> str:
        """Where the artifact's files are stored: a folder, or an object store's prefix."""

    # --- publish ---

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """Create a directory to write the files of ``key`` into; it is removed if the block raises.

        Raises DiskFull.
        """
        directory = self._folder(key) / new_attempt_directory()
        with translate_disk_full(key):
            directory.mkdir(parents=True)
            try:
                yield directory
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise

    def publish(self, key: str, directory: Path, result: dict[str, Any]) -> Manifest:
        """Publish the directory that ``writing`` created, inside its block.

        Returns the published manifest. If another attempt published first, that is its manifest, and this attempt's
        files are removed.
        """
        files = hash_and_sync(directory)
        manifest = Manifest(key=key, directory=directory.name, files=files, result=result)
        if self._publish_files(manifest):
            return manifest
        winner = self.manifest(key)
        assert winner is not None
        if winner.directory != manifest.directory:
            self._discard(manifest)
        return winner

    def publish_small(self, key: str, contents: Mapping[str, bytes], result: dict[str, Any]) -> Manifest:
        """Publish files of at most SMALL_BYTES in total inside the manifest: one write instead of one per file.

        ``contents`` maps names to bytes. Returns the published manifest, as ``publish`` does. Raises DiskFull.
        """
        files = tuple(FileEntry.inlined(name, content) for name, content in sorted(contents.items()))
        manifest = Manifest(key=key, directory=new_attempt_directory(), files=files, result=result)
        while not self._publish_inlined(manifest):
            # Garbage collection may have removed the earlier manifest since: then try again.
            if (winner := self.manifest(key)) is not None:
                return winner
        return manifest

    # --- read ---

    def open(self, key: str) -> Path:
        """Verify every file under ``key`` and return their folder. Raises ArtifactMissing or ArtifactCorrupt."""
        manifest = self._existing(key)
        self._restore_damaged(manifest)
        return self._directory(manifest)

    def path(self, manifest: Manifest, name: str) -> Path:
        """The path of the artifact's file ``name``, unverified. Raises ArtifactMissing if the artifact has no such file."""
        entry = manifest.file(name)
        path = self.root / file_path(manifest, name)
        # Inlined files are verified: their copies are not synced, and a power cut may leave them empty.
        if not (path.exists() if entry.content is None else is_intact(path, entry)):
            self._restore(manifest, entry)
        return path

    def read(self, manifest: Manifest, name: str) -> bytes:
        """The verified content of the small file ``name``. Raises ArtifactMissing or ArtifactCorrupt."""
        entry = manifest.file(name)
        content = self.path(manifest, name).read_bytes() if entry.content is None else entry.content
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise ArtifactCorrupt(f"{manifest.key}: {name} differs from its manifest")
        return content

    # --- collect garbage ---

    @abstractmethod
    def files(self) -> Iterator[StoredFile]:
        """Everything that is stored, published or not. The cache of an object store is left out."""

    def unpublish(self, keys: Sequence[str]) -> None:
        """Remove the manifests durably: their files then belong to no artifact, and the keys can be published again."""
        self.remove_files([manifest_path(key) for key in keys])

    def remove_files(self, paths: Sequence[str]) -> None:
        """Remove files that ``files`` listed, local copies of them, and folders left empty. Ignores missing paths."""
        for path in paths:
            (self.root / path).unlink(missing_ok=True)
            for folder in (self.root / path).parents:
                if folder == self.root or not remove_if_empty(folder):
                    break

    # --- what the implementations provide ---

    @abstractmethod
    def _read_manifest(self, key: str) -> bytes | None: ...

    @abstractmethod
    def _publish_files(self, manifest: Manifest) -> bool:
        """Store the attempt's files, then its manifest. Returns False if there is a manifest already."""

    @abstractmethod
    def _publish_inlined(self, manifest: Manifest) -> bool:
        """Store a manifest that carries its files. Returns False if there is a manifest already."""

    @abstractmethod
    def _fetch(self, manifest: Manifest, entry: FileEntry) -> Iterable[bytes]:
        """The content of a file whose local copy is missing or damaged. Raises ArtifactCorrupt if there is no other."""

    def _discard(self, manifest: Manifest) -> None:
        """Remove the files of an attempt that lost a race."""
        shutil.rmtree(self._directory(manifest), ignore_errors=True)

    # --- shared parts ---

    def _existing(self, key: str) -> Manifest:
        manifest = self.manifest(key)
        if manifest is None:
            raise ArtifactMissing(f"{key}: no such artifact")
        return manifest

    def _restore_damaged(self, manifest: Manifest) -> bool:
        """Verify all local copies, and replace those that are missing or damaged. Returns whether there were any."""
        directory = self._directory(manifest)
        restored = False
        for entry in manifest.files:
            if not is_intact(directory / entry.path, entry):
                self._restore(manifest, entry)
                restored = True
        return restored

    def _restore(self, manifest: Manifest, entry: FileEntry) -> None:
        """Write the local copy of a file. Several processes may do so at once."""
        path = self.root / file_path(manifest, entry.path)
        chunks = [entry.content] if entry.content is not None else self._fetch(manifest, entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        try:
            with translate_disk_full(manifest.key):
                with temporary.open("wb") as file:
                    file.writelines(chunks)
                if not is_intact(temporary, entry):
                    raise ArtifactCorrupt(f"{manifest.key}: {entry.path} differs from its manifest")
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _directory(self, manifest: Manifest) -> Path:
        return self.root / directory_path(manifest)

    def _folder(self, key: str) -> Path:
        check_key(key)
        return self.root / key
