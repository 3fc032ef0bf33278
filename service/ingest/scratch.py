"""The files of a body while it is worked on: small ones in memory, the others in a staging folder."""

import io
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from service.core.manifest import SMALL_BYTES
from service.ingest.staging import staging


class Scratch:
    """Files by their names, for whoever makes one artifact of them. ``close`` removes them all.

    Of a ``small`` body all may stay in memory, each file up to SMALL_BYTES: the staging folder is made when one is not small.
    Of any other it is made at once, so that a store that cannot be written to is known before the body is read. What
    compresses lines beside may ask for it at the same time as what reads them.
    """

    def __init__(self, root: Path, *, small: bool = False) -> None:
        self._root = root
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._making = threading.Lock()
        self._small: dict[str, bytes] = {}
        if not small:
            self._make_folder()

    @property
    def folder(self) -> Path:
        """Where the files are that are not small, and where others may be made."""
        return self._make_folder()

    def _make_folder(self) -> Path:
        with self._making:
            if self._folder is None:
                self._folder = self._stack.enter_context(staging(self._root))
            return self._folder

    def create(self, name: str) -> "ScratchFile":
        """A file to write, in place of the one of that name. It is there once it is closed."""
        self._small.pop(name, None)
        return ScratchFile(self, name)

    def small(self, name: str) -> bytes | None:
        """The content of a small file; None for one in the folder."""
        return self._small.get(name)

    def source(self, name: str) -> bytes | Path:
        """The content of a small file, or where the file is."""
        content = self._small.get(name)
        return self.folder / name if content is None else content

    def open(self, name: str) -> BinaryIO:
        """A file to read."""
        source = self.source(name)
        return source.open("rb") if isinstance(source, Path) else io.BytesIO(source)

    def keep(self, name: str, content: bytes) -> None:
        self._small[name] = content

    def close(self) -> None:
        self._small.clear()
        self._stack.close()


class ScratchFile:
    """Written from its beginning to its end, and then closed."""

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
            so_far = self._file.getvalue()
            self._file = (self._scratch.folder / self._name).open("wb")
            self._is_small = False
            self._file.write(so_far)
        self._file.write(data)

    def truncate(self, size: int) -> None:
        """Leave only the beginning."""
        self._file.truncate(size)

    def close(self) -> None:
        if self._file.closed:
            return
        if isinstance(self._file, io.BytesIO):
            self._scratch.keep(self._name, self._file.getvalue())
        self._file.close()
