"""A sorted file of 32-byte sha256 hashes: membership and ranges without reading it into memory."""

import mmap
import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from struct import iter_unpack
from types import TracebackType
from typing import Protocol, Self, overload

HASH_BYTES = 32

# Hashes copied out of the map at once while walking a range: 1 MiB.
_WALK_BLOCK = 1 << 15

# Walking a range costs about 0.1 µs a hash, a lookup about 4 µs.
_WALK_TO_LOOKUP_COST = 32


class HashSet(Protocol):
    """A set of document hashes that a block of hashes can be compared with."""

    def among(self, block: Sequence[bytes]) -> set[bytes]:
        """The hashes of a sorted block that are in this set."""
        ...


def hash_at(share: float) -> bytes:
    """The hash below which ``share`` of all possible hashes lie; for 1 or more, above every hash."""
    return int(share * 2**64).to_bytes(8, "big") if share < 1 else b"\xff" * (HASH_BYTES + 1)


class Hashes(Sequence[bytes]):
    """Sorted hashes between two indices of a buffer."""

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
                raise ValueError("a slice of hashes cannot have a step")
            return Hashes(self._buffer, self._start + start, self._start + max(start, stop))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        at = (self._start + index % len(self)) * HASH_BYTES
        return self._buffer[at : at + HASH_BYTES]

    def __iter__(self) -> Iterator[bytes]:
        for start in range(self._start, self._stop, _WALK_BLOCK):
            block = self._buffer[start * HASH_BYTES : min(start + _WALK_BLOCK, self._stop) * HASH_BYTES]
            yield from chain.from_iterable(iter_unpack(f"{HASH_BYTES}s", block))

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, bytes) and self.find(digest) is not None

    def find(self, digest: bytes) -> int | None:
        """Index of a hash; None if it is not in this set."""
        index = bisect_left(self, digest)
        return index if index < len(self) and self[index] == digest else None

    def num_below(self, bound: bytes) -> int:
        """How many hashes are lower than ``bound``."""
        return bisect_left(self, bound)

    def among(self, block: Sequence[bytes]) -> set[bytes]:
        """The hashes of a sorted block that are in this set, found by lookups or a walk."""
        if not block:
            return set()
        low = bisect_left(self, block[0])
        high = bisect_left(self, block[-1], low)
        if high - low > _WALK_TO_LOOKUP_COST * len(block):
            return {digest for digest in block if self.find(digest) is not None}
        return set(block).intersection(self[low : high + 1])


class HashFile(Hashes):
    """A memory-mapped file of sorted hashes, or the content of one; a context manager.

    Raises ValueError if the size is not a multiple of 32.
    """

    def __init__(self, source: Path | bytes) -> None:
        self._map = None if isinstance(source, bytes) else _map_file(source)
        content = source if isinstance(source, bytes) else self._map or b""
        size = len(content)
        if size % HASH_BYTES:
            self.close()
            name = source.name if isinstance(source, Path) else "a file in memory"
            raise ValueError(f"{name}: {size} bytes are not whole hashes")
        super().__init__(content, 0, size // HASH_BYTES)

    def release_pages(self) -> None:
        """Unmap the pages read so far, which otherwise count as this process's memory.

        They stay in the page cache. Without this, a walk through a file ends with all of it resident.
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


def _map_file(path: Path) -> mmap.mmap | None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) if size else None  # mmap refuses 0 bytes
    finally:
        os.close(descriptor)
