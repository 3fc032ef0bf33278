"""Files of a body while it is ingested: small ones in memory, the others in a locked staging folder."""

import fcntl
import io
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from service.core.manifest import SMALL_BYTES

_PREFIX = ".ingest-"

# A younger folder may belong to a process that has created but not yet locked it.
_MIN_ABANDONED_SECONDS = 60


class Scratch:
    """The named files of one body. ``close`` deletes them all.

    With ``small``, files of up to SMALL_BYTES stay in memory, and the staging folder is created only when a
    file outgrows that. Otherwise the folder is created at once, so that an unwritable store is noticed before
    the body is read. The parsing and the compressing thread may use it at the same time.
    """

    def __init__(self, root: Path, *, small: bool = False) -> None:
        self._root = root
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._folder_lock = threading.Lock()
        self._small_files: dict[str, bytes] = {}
        if not small:
            self._create_folder()

    @property
    def folder(self) -> Path:
        """The folder of the files that are not in memory; callers may create other files in it."""
        return self._create_folder()

    def _create_folder(self) -> Path:
        with self._folder_lock:
            if self._folder is None:
                self._folder = self._stack.enter_context(staging(self._root))
            return self._folder

    def create(self, name: str) -> "ScratchFile":
        """Open a file for writing, replacing an earlier one. It can be read once it is closed."""
        self._small_files.pop(name, None)
        return ScratchFile(self, name)

    def small(self, name: str) -> bytes | None:
        """Content of a file in memory; None for a file in the folder."""
        return self._small_files.get(name)

    def source(self, name: str) -> bytes | Path:
        """Content of a file in memory, or the path of a file in the folder."""
        content = self._small_files.get(name)
        return self.folder / name if content is None else content

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading."""
        source = self.source(name)
        return source.open("rb") if isinstance(source, Path) else io.BytesIO(source)

    def keep(self, name: str, content: bytes) -> None:
        """Keep a file in memory."""
        self._small_files[name] = content

    def close(self) -> None:
        self._small_files.clear()
        self._stack.close()


class ScratchFile:
    """A file that is written once, from beginning to end. It starts in memory."""

    def __init__(self, scratch: Scratch, name: str) -> None:
        self._scratch = scratch
        self._name = name
        self._file: BinaryIO = io.BytesIO()
        self._bytes = 0
        self._is_small = True

    def write(self, data: bytes | bytearray) -> None:
        self._bytes += len(data)
        if self._is_small and self._bytes > SMALL_BYTES:
            assert isinstance(self._file, io.BytesIO)
            content = self._file.getvalue()
            self._file = (self._scratch.folder / self._name).open("wb")
            self._is_small = False
            self._file.write(content)
        self._file.write(data)

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def close(self) -> None:
        if self._file.closed:
            return
        if isinstance(self._file, io.BytesIO):
            self._scratch.keep(self._name, self._file.getvalue())
        self._file.close()


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    """Create a locked folder under ``root`` and delete it at the end of the block.

    Also deletes the folders of killed processes, which the kernel has unlocked.
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
            if time.time() - directory.stat().st_mtime < _MIN_ABANDONED_SECONDS:
                continue
            descriptor = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:  # its owner has just deleted it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)
