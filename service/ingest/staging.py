"""Where a body that is not small is written until it is whole: a folder of its own beside the artifacts, held by a lock."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = ".ingest-"

# A folder this young may belong to a process that has made it and not locked it yet.
_LOCKED_WITHIN_SECONDS = 60


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    """Give a folder under ``root`` that is removed at the end, whatever happens.

    The folders of processes that were killed are removed on the way: nobody holds their locks.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(descriptor)


def _remove_abandoned(root: Path) -> None:
    for directory in root.glob(f"{_PREFIX}*"):
        try:
            if time.time() - directory.stat().st_mtime < _LOCKED_WITHIN_SECONDS:
                continue
            descriptor = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:  # its owner has just finished
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
