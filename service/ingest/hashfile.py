"""A sorted file of sha256 hashes, 32 bytes each: membership and ranges without reading it into memory."""

import mmap
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from struct import iter_unpack
from types import TracebackType
from typing import Self, overload

HASH_BYTES = 32

# Hashes that are taken out of the map at once while walking a range: 1 MiB of them.
_WALK = 1 << 15

# Walking a range of the file costs about 0.1 µs a hash, looking one up about 4 µs.
_WALK_RATHER_THAN_LOOK_UP = 32


def hash_at(share: float) -> bytes:
    """Where ``share`` of all possible hashes are lower; for 1 or more past every hash."""
    return int(share * 2**64).to_bytes(8, "big") if share < 1 else b"\xff" * (HASH_BYTES + 1)


class Hashes(Sequence[bytes]):
    """Sorted hashes between two indices of a buffer of them."""

    def __init__(self, buffer: mmap.mmap | bytes, start: int, stop: int) -> None:
        self._buffer = buffer
        self._start = start
        self._stop = stop

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> "Hashes": ...
    def __getitem__(self, index: int | slice) -> "bytes | Hashes":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError("a range of hashes has no step")
            return Hashes(self._buffer, self._start + start, self._start + max(start, stop))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        at = (self._start + index % len(self)) * HASH_BYTES
        return self._buffer[at : at + HASH_BYTES]

    def __iter__(self) -> Iterator[bytes]:
        for start in range(self._start, self._stop, _WALK):
            block = self._buffer[start * HASH_BYTES : min(start + _WALK, self._stop) * HASH_BYTES]
            yield from chain.from_iterable(iter_unpack(f"{HASH_BYTES}s", block))

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, bytes) and self.find(digest) is not None

    def find(self, digest: bytes) -> int | None:
        """Index of a hash; None where it is not in here."""
        index = bisect_left(self, digest)
        return index if index < len(self) and self[index] == digest else None

    def below(self, bound: bytes) -> int:
        """How many hashes are lower than ``bound``."""
        return bisect_left(self, bound)

    def among(self, block: Sequence[bytes]) -> set[bytes]:
        """Those of a sorted block that are in here, in the cheaper of two ways."""
        if not block:
            return set()
        low = bisect_left(self, block[0])
        high = bisect_left(self, block[-1], low)
        if high - low > _WALK_RATHER_THAN_LOOK_UP * len(block):
            return {digest for digest in block if self.find(digest) is not None}
        return set(block).intersection(self[low : high + 1])


class HashFile(Hashes):
    """Such a file, mapped, or the content of one; a context manager. Raises ValueError for a size that is no multiple of 32."""

    def __init__(self, source: Path | bytes) -> None:
        self._map = None if isinstance(source, bytes) else _mapped(source)
        content = source if isinstance(source, bytes) else self._map or b""
        size = len(content)
        if size % HASH_BYTES:
            self.close()
            name = source.name if isinstance(source, Path) else "a file"
            raise ValueError(f"{name}: {size} bytes are not whole hashes")
        super().__init__(content, 0, size // HASH_BYTES)

    def forget(self) -> None:
        """Give back the pages that were read, which count as this process's memory while they are mapped.

        They stay in the system's cache. A walk through a file that never does this ends with all of it.
        """
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _mapped(path: Path) -> mmap.mmap | None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) if size else None  # no map is empty
    finally:
        os.close(descriptor)
