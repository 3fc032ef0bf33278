"""The local cache of an object store's files, kept below a size by evicting the least recently used artifacts."""

import os
import shutil
import time
import uuid
from pathlib import Path

from service.artifacts.layout import is_attempt_directory

# By then, any reader of an artifact has loaded or mapped its files.
IN_USE_SECONDS = 3600.0


def mark_used(directory: Path) -> None:
    """Record that the artifact whose files are in ``directory`` is in use now."""
    os.utime(directory)


def remove_copies(folder: Path) -> None:
    """Remove the cached files of the artifact whose key is ``folder``."""
    if folder.is_dir():
        for directory in [child for child in folder.iterdir() if is_attempt_directory(child.name)]:
            shutil.rmtree(directory, ignore_errors=True)


def evict(root: Path, max_bytes: int) -> None:
    """Remove the least recently used artifacts until the rest fits in ``max_bytes``; none used within the hour."""
    copies = _copies(root)
    total = sum(size for _, size, _ in copies)
    for used_at, size, directory in sorted(copies):
        if total <= max_bytes or used_at > time.time() - IN_USE_SECONDS:
            break
        # Rename first, so that no reader finds half of the files.
        evicted = root / f".evicted-{uuid.uuid4().hex}"
        try:
            directory.rename(evicted)
        except FileNotFoundError:  # another process evicted it
            continue
        shutil.rmtree(evicted, ignore_errors=True)
        total -= size


def _copies(root: Path) -> list[tuple[float, int, Path]]:
    """When each cached artifact was last used, its size, and its directory."""
    copies = []
    for folder, names, _ in os.walk(root):
        if Path(folder) == root:
            names[:] = [name for name in names if not name.startswith(".")]
        for name in [name for name in names if is_attempt_directory(name)]:
            names.remove(name)
            directory = Path(folder, name)
            try:
                copies.append((directory.stat().st_mtime, _bytes_in(directory), directory))
            except FileNotFoundError:  # another process evicted it
                continue
    return copies


def _bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
