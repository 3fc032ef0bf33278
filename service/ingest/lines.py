"""Lines in a file that is compressed with zstd."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

# Level 1 makes text 2 to 3 times smaller at 4 ms a MiB; level 3 takes three times as long for a fifth less.
_LEVEL = 1
BATCH_BYTES = 1 << 18


class LineFile:
    """Writes lines into a zstd file, in batches that depend on them alone: equal lines give equal bytes.

    ``threads``: how many others compress, from the second batch on. To start one for a few lines costs more than they do.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        self._file: BinaryIO = path.open("wb")
        self._threads = threads
        self._compressor: Any = None  # its class has a name for type checkers only
        self._held: list[bytes] = []
        self._held_bytes = 0

    def write(self, line: bytes) -> None:
        """Add a line, given with its line end."""
        self._held.append(line)
        self._held_bytes += len(line)
        if self._held_bytes >= BATCH_BYTES:
            self._flush(self._threads)

    def seal(self) -> None:
        """Write what is held and end the zstd frame."""
        compressor = self._flush(0)
        self._file.write(compressor.flush())
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def _flush(self, threads: int) -> Any:
        if self._compressor is None:
            new = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, threads=threads)
            self._compressor = new.compressobj()
        self._file.write(self._compressor.compress(b"".join(self._held)))
        self._held = []
        self._held_bytes = 0
        return self._compressor


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a zstd file, each with its line end."""
    with (
        path.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file, read_size=1 << 18, closefd=False) as stream,
        io.BufferedReader(stream, 1 << 20) as lines,
    ):
        yield from lines
