"""Content-addressed artifacts: a folder of files under a key, published by a manifest of hashes written last.

An artifact exists when its manifest exists. Files are written into a directory of their own per attempt, fsynced, and
only then is the manifest linked into place; linking fails if the name exists, so publishing is create-only and the loser
of a race adopts the winner's manifest. Every open verifies sizes and sha256s first.

    <root>/<key>/manifest.json        {"key", "directory", "files": [{"path","sha256","bytes"}], "result"}
    <root>/<key>/<attempt>/<files>

In an object store it is the same under its prefix: files are uploaded, and then the manifest is written with a write that
only succeeds where none is. The root is a cache of files then, and holds no manifest: what exists is asked of the store.

Files of a few KiB may be in the manifest itself ("content", base64): they are published with one write. Whoever opens such an
artifact is given copies, in the directory that it names.
"""

import hashlib
import io
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from service import artifact_cache
from service.core.errors import ArtifactCorrupt, ArtifactMissing, Unavailable
from service.core.manifest import MANIFEST, SMALL_BYTES, FileEntry, Manifest
from service.object_store import ObjectStore
from service.room import room_for


@dataclass(frozen=True)
class StoredFile:
    """``path`` is relative to the root; ``modified`` in seconds since the epoch, by the store's clock."""

    path: str
    bytes: int
    modified: float


class Artifacts:
    """Artifacts under one root folder, or in an object store, of which the root holds copies, as of files in manifests.

    Keys are relative POSIX paths such as ``pack/3f9c…``. With an object store everything may raise Unavailable.
    """

    def __init__(
        self, root: Path, store: ObjectStore | None = None, *, max_cache_bytes: int | None = None
    ) -> None:
        self.root = root
        self._store = store
        self._max_cache_bytes = max_cache_bytes

    @classmethod
    def from_url(cls, url: str) -> "Artifacts":
        """Open the store at ``file:///path``, or at ``s3://bucket/prefix#cache=/path`` with copies of files in that folder.

        ``&max_bytes=`` keeps the folder below that size. Raises ValueError for anything else.
        """
        parsed = urlparse(url)
        if parsed.scheme == "file":
            return cls(Path(unquote(parsed.path)))
        said = {name: values[0] for name, values in parse_qs(parsed.fragment).items()}
        cache = said.get("cache", "")
        if parsed.scheme != "s3" or not parsed.netloc or not cache:
            raise ValueError(f"artifacts URL {url!r}: file:///path or s3://bucket/prefix")
        max_bytes = int(said["max_bytes"]) if "max_bytes" in said else None
        return cls(Path(cache), ObjectStore(url.partition("#")[0]), max_cache_bytes=max_bytes)

    @property
    def is_remote(self) -> bool:
        """Whether looking at an artifact may have to ask an object store."""
        return self._store is not None

    @property
    def url(self) -> str:
        """By which another process opens the same."""
        if self._store is not None:
            return artifact_cache.url_of(self._store.url, self.root, self._max_cache_bytes)
        return self.root.absolute().as_uri()

    def check(self) -> None:
        """Raise OSError or Unavailable unless the store can be written to."""
        self.root.mkdir(parents=True, exist_ok=True)
        probe = self.root / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
        if self._store is not None:
            self._store.check()

    def manifest(self, key: str) -> Manifest | None:
        """Read the manifest under ``key``; None where the artifact does not exist. Raises ArtifactCorrupt."""
        folder = self._folder(key)
        try:
            raw = self._store.read(f"{key}/{MANIFEST}") if self._store else (folder / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if raw is None:
            return None
        try:
            return Manifest.model_validate_json(raw)
        except ValueError as error:
            raise ArtifactCorrupt(f"{key}: unreadable manifest") from error

    def exists(self, key: str) -> bool:
        """Whether there is an artifact under ``key``."""
        if self._store is not None:
            return self._store.read(f"{key}/{MANIFEST}") is not None
        return os.path.exists(self._folder(key) / MANIFEST)

    @contextmanager
    def writing(self, key: str) -> Iterator[Path]:
        """Give a fresh directory to write the files of ``key`` into; it is removed if the block raises.

        Raises NoRoom where the disk is full.
        """
        directory = self._folder(key) / _attempt()
        with room_for(key):
            directory.mkdir(parents=True)
            try:
                yield directory
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise

    def publish(self, key: str, directory: Path, result: dict[str, Any]) -> Manifest:
        """Publish what ``writing`` gave, inside its block. Returns the manifest that counts: ours, or whoever was first's."""
        files = []
        for folder, _, names in os.walk(directory):
            files += [_hash_and_sync(Path(folder, name), directory) for name in names]
            _sync_folder(Path(folder))
        files.sort(key=lambda entry: entry.path)
        manifest = Manifest(key=key, directory=directory.name, files=tuple(files), result=result)
        created = self._upload(manifest, directory) if self._store else self._link(manifest)
        if created:
            return manifest
        winner = self.manifest(key)
        assert winner is not None
        if winner.directory != manifest.directory:
            self._forget(manifest, directory)
        return winner

    def publish_small(self, key: str, contents: Mapping[str, bytes], result: dict[str, Any]) -> Manifest:
        """Publish files of SMALL_BYTES in all at most, by their names, in the manifest: with one write instead of one a file.

        Returns the manifest that counts, as ``publish`` does. Raises NoRoom where the disk is full.
        """
        files = tuple(FileEntry.holding(name, content) for name, content in sorted(contents.items()))
        manifest = Manifest(key=key, directory=_attempt(), files=files, result=result)
        while True:
            if self._store is not None:
                created = self._store.create(f"{key}/{MANIFEST}", manifest.to_json())
            else:
                created = self._link_small(manifest)
            if created:
                return manifest
            # Between that and this, garbage collection may have removed the one that was there.
            if (winner := self.manifest(key)) is not None:
                return winner

    def _link_small(self, manifest: Manifest) -> bool:
        folder = self._folder(manifest.key)
        while True:
            with room_for(manifest.key):
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    return self._link(manifest)
                except FileNotFoundError:
                    continue  # a folder that was empty for a moment, and has been removed
                except BaseException:
                    _remove_empty(folder)
                    raise

    def _link(self, manifest: Manifest) -> bool:
        """Put the manifest in place. False where one is."""
        folder = self._folder(manifest.key)
        temporary = folder / f".{MANIFEST}-{uuid.uuid4().hex}"
        try:
            with temporary.open("wb") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, folder / MANIFEST)
                created = True
            except FileExistsError:
                created = False
        finally:
            temporary.unlink(missing_ok=True)
        try:
            # The whole chain of new folders must survive a power cut, not only the last one; and what is taken over must,
            # though its owner has not come that far.
            while folder != self.root.parent:
                _sync_folder(folder)
                folder = folder.parent
        except OSError:
            if created and not manifest.is_whole:
                # The files go with the attempt, which has failed: no manifest may promise them.
                (self._folder(manifest.key) / MANIFEST).unlink(missing_ok=True)
            raise
        return created

    def _upload(self, manifest: Manifest, directory: Path) -> bool:
        """Files first, the manifest last. False where one is: perhaps this one, whose answer was lost."""
        assert self._store is not None
        for entry in manifest.files:
            self._store.upload(self._object(manifest, entry.path), directory / entry.path)
        return self._store.create(f"{manifest.key}/{MANIFEST}", manifest.to_json())

    def _forget(self, manifest: Manifest, directory: Path) -> None:
        """What lost a race. Objects that stay because the store does not answer belong to no manifest, and harm nobody."""
        shutil.rmtree(directory, ignore_errors=True)
        if self._store is not None:
            with suppress(Unavailable):
                self._store.delete([self._object(manifest, entry.path) for entry in manifest.files])

    def open(self, key: str) -> Path:
        """Verify every file under ``key`` and return its folder. Raises ArtifactMissing or ArtifactCorrupt."""
        manifest = self.manifest(key)
        if manifest is None:
            raise ArtifactMissing(f"{key}: no such artifact")
        folder = self._folder(key) / manifest.directory
        if self._store is not None and folder.is_dir():
            artifact_cache.mark_used(
                folder
            )  # before it is read: whoever trims the cache leaves it alone then
        fetched = False
        for entry in manifest.files:
            path = folder / entry.path
            if _is(path, entry):
                continue
            if self._store is None and entry.content is None:
                what = "differs from its manifest" if path.exists() else "is missing"
                raise ArtifactCorrupt(f"{key}: {entry.path} {what}")
            self._fetch(manifest, entry)  # there is no copy, or a damaged one
            fetched = True
        if fetched and self._max_cache_bytes is not None:
            artifact_cache.trim(self.root, self._max_cache_bytes)
        return folder

    def path(self, manifest: Manifest, name: str) -> Path:
        """Where the file ``name`` of an artifact lies, unverified. Raises ArtifactMissing if the artifact has no such file."""
        entry = manifest.file(name)
        path = self._folder(manifest.key) / manifest.directory / name
        if entry.content is not None:
            # A copy is not fsynced: after a power cut there may be one that is empty.
            if not _is(path, entry):
                self._fetch(manifest, entry)
        elif self._store is not None and not path.exists():
            self._fetch(manifest, entry)
        if self._store is not None:
            artifact_cache.mark_used(self._folder(manifest.key) / manifest.directory)
        return path

    def read(self, manifest: Manifest, name: str) -> bytes:
        """The verified content of the small file ``name``. Raises ArtifactMissing or ArtifactCorrupt."""
        entry = manifest.file(name)
        content = entry.content
        if content is None:
            try:
                content = self.path(manifest, name).read_bytes()
            except FileNotFoundError:
                raise ArtifactCorrupt(f"{manifest.key}: {name} is missing") from None
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise ArtifactCorrupt(f"{manifest.key}: {name} differs from its manifest")
        return content

    def location(self, manifest: Manifest) -> str:
        """Where the files of an artifact lie: a folder, or a prefix of the object store."""
        if self._store is not None:
            return f"{self._store.url}/{manifest.key}/{manifest.directory}"
        return str(self._folder(manifest.key) / manifest.directory)

    def keys(self, prefix: str) -> list[str]:
        """Keys of the published artifacts exactly one level below ``prefix``, sorted."""
        folder = self._folder(prefix)
        if self._store is not None:
            depth = prefix.count("/") + 3
            found = (path.split("/") for path in self._store.paths(prefix))
            return sorted("/".join(p[:-1]) for p in found if len(p) == depth and p[-1] == MANIFEST)
        if not folder.is_dir():
            return []
        return sorted(f"{prefix}/{child.name}" for child in folder.iterdir() if (child / MANIFEST).is_file())

    def files(self) -> Iterator[StoredFile]:
        """Everything that is stored, whatever it belongs to: of an object store the objects, not the copies here."""
        if self._store is not None:
            yield from (StoredFile(*found) for found in self._store.objects())
            return
        for folder, names, files in os.walk(self.root):
            if Path(folder) == self.root:  # work in progress of others, who clean up after themselves
                names[:] = [name for name in names if not name.startswith(".")]
                continue
            for name in files:
                path = Path(folder, name)
                with suppress(FileNotFoundError):
                    status = path.stat()
                    yield StoredFile(path.relative_to(self.root).as_posix(), status.st_size, status.st_mtime)

    def unpublish(self, keys: Sequence[str]) -> None:
        """Remove the manifests, for good: what is left belongs to no artifact, and whoever needs one makes it again."""
        paths = [f"{key}/{MANIFEST}" for key in keys]
        self.remove_files(paths)
        folders = {self._folder(key) for key in keys}
        if self._store is not None:
            for copies in (copies for folder in folders for copies in folder.glob("w-*")):
                shutil.rmtree(copies, ignore_errors=True)
        else:
            for folder in folders:
                # Before any of its files: a manifest that came back after a power cut would promise what is not there.
                if folder.is_dir():
                    _sync_folder(folder)

    def remove_files(self, paths: Sequence[str]) -> None:
        """Remove what ``files`` has found, its copies, and the folders that are empty then. Paths that are not there are fine."""
        if self._store is not None:
            self._store.delete(list(paths))
        for path in paths:
            (self.root / path).unlink(missing_ok=True)
            for folder in (self.root / path).parents:
                if folder == self.root or not _remove_empty(folder):
                    break

    def _fetch(self, manifest: Manifest, entry: FileEntry) -> None:
        """Copy a file out of the manifest or the store; another process that does the same at once does no harm."""
        path = self._folder(manifest.key) / manifest.directory / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        try:
            with room_for(manifest.key):
                chunks = self._chunks(manifest, entry)
                if chunks is None:
                    raise ArtifactCorrupt(f"{manifest.key}: {entry.path} is missing")
                with temporary.open("wb") as file:
                    file.writelines(chunks)
                if not _is(temporary, entry):
                    raise ArtifactCorrupt(f"{manifest.key}: {entry.path} differs from its manifest")
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _chunks(self, manifest: Manifest, entry: FileEntry) -> Iterable[bytes] | None:
        if entry.content is not None:
            return [entry.content]
        assert self._store is not None
        return self._store.chunks(self._object(manifest, entry.path))

    def _object(self, manifest: Manifest, name: str) -> str:
        return f"{manifest.key}/{manifest.directory}/{name}"

    def _folder(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"not an artifact key: {key!r}")
        return self.root.joinpath(*parts)


def _attempt() -> str:
    """A name of its own for the directory of an attempt."""
    return f"w-{uuid.uuid4().hex[:12]}"


def _is(path: Path, entry: FileEntry) -> bool:
    """Whether the file has the bytes that the manifest says."""
    try:
        return path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256
    except FileNotFoundError:
        return False


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(file, path.stat().st_size)


def _digest(file: io.BufferedReader, size: int) -> str:
    """Hash of a file from where it stands. That of a small one takes less than the buffer of 256 KiB that file_digest makes."""
    if size <= SMALL_BYTES:
        return hashlib.sha256(file.read()).hexdigest()
    return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_and_sync(path: Path, directory: Path) -> FileEntry:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = _digest(file, size)
        os.fsync(file.fileno())
    return FileEntry(path=path.relative_to(directory).as_posix(), sha256=digest, bytes=size)


def _remove_empty(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
