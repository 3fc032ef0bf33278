"""Hash, verify and sync the files of an artifact."""

import hashlib
import io
import os
from pathlib import Path

from service.core.manifest import SMALL_BYTES, FileEntry


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return _digest(file, path.stat().st_size)


def is_intact(path: Path, entry: FileEntry) -> bool:
    """Whether the file exists with the size and the hash in its manifest."""
    try:
        return path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256
    except FileNotFoundError:
        return False


def hash_and_sync(directory: Path) -> tuple[FileEntry, ...]:
    """Sync every file and folder below ``directory``. Returns the files' entries, sorted by path."""
    entries = []
    for folder, _, names in os.walk(directory):
        entries += [_hash_and_sync(Path(folder, name), directory) for name in names]
        sync_folder(Path(folder))
    return tuple(sorted(entries, key=lambda entry: entry.path))


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_if_empty(folder: Path) -> bool:
    """Remove ``folder`` if it is empty. Returns whether it was removed."""
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def _hash_and_sync(path: Path, directory: Path) -> FileEntry:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = _digest(file, size)
        os.fsync(file.fileno())
    return FileEntry(path=path.relative_to(directory).as_posix(), sha256=digest, bytes=size)


def _digest(file: io.BufferedReader, size: int) -> str:
    # A small file is hashed in less time than file_digest takes to allocate its buffer of 256 KiB.
    if size <= SMALL_BYTES:
        return hashlib.sha256(file.read()).hexdigest()
    return hashlib.file_digest(file, "sha256").hexdigest()
