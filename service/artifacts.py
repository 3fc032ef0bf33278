"""Content-addressed artifacts: a folder of files under a key, published by a manifest of hashes written last.

An artifact exists when its manifest exists. Files are written into a directory of their own per attempt, fsynced, and
only then is the manifest linked into place; linking fails if the name exists, so publishing is create-only and the loser
of a race adopts the winner's manifest. Every open verifies sizes and sha256s first.

    <root>/<key>/manifest.json        {"key", "kind", "directory", "files": [{"path","sha256","bytes"}], "result", …}
    <root>/<key>/<attempt>/<files>
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from pydantic import BaseModel, ConfigDict

from service.core.errors import ArtifactCorrupt, ArtifactMissing

MANIFEST = "manifest.json"


class FileEntry(BaseModel):
    model_config = ConfigDict(frozen=True)

    path: str
    sha256: str
    bytes: int


class Manifest(BaseModel):
    """What an artifact is: its files by hash, and the ``result`` its stage computed (plain JSON)."""

    model_config = ConfigDict(frozen=True)

    key: str
    directory: str
    files: tuple[FileEntry, ...]
    result: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def sha256(self) -> str:
        """Hash of the sorted file list: equal artifacts have equal hashes whatever the attempt was called."""
        lines = "".join(f"{f.sha256}  {f.path}\n" for f in sorted(self.files, key=lambda f: f.path))
        return hashlib.sha256(lines.encode()).hexdigest()


class Artifacts:
    """Artifacts under one root folder. Keys are relative POSIX paths such as ``pack/3f9c…``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def from_url(cls, url: str) -> "Artifacts":
        """Open the store at ``file:///path``. Raises ValueError for a scheme that is not supported."""
        parsed = urlparse(url)
        if parsed.scheme != "file":
            raise ValueError(f"artifacts URL {url!r}: only file:// is supported")
        return cls(Path(unquote(parsed.path)))

    @property
    def url(self) -> str:
        return self.root.absolute().as_uri()

    def check(self) -> None:
        """Raise OSError unless the store can be written to."""
        self.root.mkdir(parents=True, exist_ok=True)
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()

    def manifest(self, key: str) -> Manifest | None:
        """Read the manifest under ``key``; None where the artifact does not exist. Raises ArtifactCorrupt."""
        try:
            raw = (self._folder(key) / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return Manifest.model_validate_json(raw)
        except ValueError as error:
            raise ArtifactCorrupt(f"{key}: unreadable manifest") from error

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """Give a fresh directory to write the files of ``key`` into; it is removed if the block raises."""
        directory = self._folder(key) / f"w-{uuid.uuid4().hex[:12]}"
        directory.mkdir(parents=True)
        try:
            yield directory
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def publish(self, key: str, directory: Path, result: dict[str, Any]) -> Manifest:
        """Publish what ``writing`` gave. Returns the manifest that counts: ours, or that of whoever was first."""
        files = tuple(
            _hash_and_sync(path, directory) for path in sorted(directory.rglob("*")) if path.is_file()
        )
        for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
            _sync_folder(folder)
        manifest = Manifest(key=key, directory=directory.name, files=files, result=result)
        folder = self._folder(key)
        temporary = folder / f".{MANIFEST}-{uuid.uuid4().hex}"
        with temporary.open("wb") as file:
            file.write(json.dumps(manifest.model_dump(), indent=1, sort_keys=True).encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, folder / MANIFEST)
        except FileExistsError:
            winner = self.manifest(key)
            assert winner is not None
            shutil.rmtree(directory, ignore_errors=True)
            return winner
        finally:
            temporary.unlink()
        # The whole chain of new folders must survive a power cut, not only the last one.
        while folder != self.root.parent:
            _sync_folder(folder)
            folder = folder.parent
        return manifest

    def open(self, key: str) -> Path:
        """Verify every file under ``key`` and return its folder. Raises ArtifactMissing or ArtifactCorrupt."""
        manifest = self.manifest(key)
        if manifest is None:
            raise ArtifactMissing(f"{key}: no such artifact")
        folder = self._folder(key) / manifest.directory
        for entry in manifest.files:
            path = folder / entry.path
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise ArtifactCorrupt(f"{key}: {entry.path} is missing") from None
            if size != entry.bytes or _sha256(path) != entry.sha256:
                raise ArtifactCorrupt(f"{key}: {entry.path} differs from its manifest")
        return folder

    def path(self, manifest: Manifest, name: str) -> Path:
        """Where the file ``name`` of an artifact lies, unverified. Raises ArtifactMissing if the artifact has no such file."""
        if all(entry.path != name for entry in manifest.files):
            raise ArtifactMissing(f"{manifest.key}: no file {name!r}")
        return self._folder(manifest.key) / manifest.directory / name

    def folder(self, manifest: Manifest) -> Path:
        """Where the files of an artifact lie, unverified."""
        return self._folder(manifest.key) / manifest.directory

    def keys(self, prefix: str) -> list[str]:
        """Keys of the published artifacts exactly one level below ``prefix``, sorted."""
        folder = self._folder(prefix)
        if not folder.is_dir():
            return []
        return sorted(f"{prefix}/{child.name}" for child in folder.iterdir() if (child / MANIFEST).is_file())

    def _folder(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"not an artifact key: {key!r}")
        return self.root.joinpath(*parts)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_and_sync(path: Path, directory: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    return FileEntry(path=path.relative_to(directory).as_posix(), sha256=digest, bytes=size)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
