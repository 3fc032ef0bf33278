"""The folder that holds copies of an object store's artifacts: kept below a size by removing what was not opened for longest."""

import os
import re
import shutil
import time
import uuid
from pathlib import Path
from urllib.parse import urlencode

ATTEMPT_DIRECTORY = re.compile(r"w-[0-9a-f]{12}")
# Whoever has opened an artifact has loaded or mapped its files by then.
IN_USE_SECONDS = 3600.0
_EVICTED = ".evicted-"


def url_of(url: str, cache: Path, max_bytes: int | None) -> str:
    """The URL of an object store with where copies are kept, and how many bytes of them."""
    said = {"cache": cache} | ({} if max_bytes is None else {"max_bytes": max_bytes})
    return f"{url}#{urlencode(said)}"


def mark_used(directory: Path) -> None:
    """``directory`` holds the files of one artifact."""
    os.utime(directory)


def trim(root: Path, max_bytes: int) -> int:
    """Remove least recently used artifacts, none used within the hour, until those under ``root`` fit. Returns bytes removed."""
    copies = []
    for folder, names, _ in os.walk(root):
        if Path(folder) == root:
            names[:] = [name for name in names if not name.startswith(".")]
        for name in [name for name in names if ATTEMPT_DIRECTORY.fullmatch(name)]:
            names.remove(name)
            directory = Path(folder, name)
            try:
                copies.append((directory.stat().st_mtime, _bytes_in(directory), directory))
            except FileNotFoundError:  # another process trims too
                continue
    total, removed = sum(size for _, size, _ in copies), 0
    for used, size, directory in sorted(copies):
        if total - removed <= max_bytes or used > time.time() - IN_USE_SECONDS:
            break
        # Out of the way at once: nobody shall find half of it.
        aside = root / f"{_EVICTED}{uuid.uuid4().hex}"
        try:
            directory.rename(aside)
        except FileNotFoundError:
            continue
        shutil.rmtree(aside, ignore_errors=True)
        removed += size
    return removed


def _bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
