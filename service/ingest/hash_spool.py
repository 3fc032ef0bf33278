"""The hashes of a body's documents, spooled while it streams in: in body order, and as sorted runs."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, pairwise
from pathlib import Path
from struct import iter_unpack
from typing import BinaryIO

from service.ingest.hash_file import HASH_BYTES, Hashes, HashFile, hash_at
from service.ingest.scratch import Scratch

# Hashes per sorted run. Sorting 65,536 of them as bytes objects takes about 6 MB; buffering them takes 2 MB.
RUN_LENGTH = 1 << 16

_ORDER = "order.bin"
_RUNS = "runs.bin"


class HashSpool:
    """Collects hashes in flat memory. Call ``seal`` before reading them, in order or merged.

    A body of less than one run never creates a file.
    """

    def __init__(self, scratch: Scratch, run_length: int = RUN_LENGTH) -> None:
        self.count = 0
        self._run_length = run_length
        self._scratch = scratch
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self._stack = ExitStack()
        self._run_ends: list[int] = []  # in runs.bin, counted in hashes
        self._buffer = bytearray()

    def add(self, digest: bytes) -> None:
        self._buffer += digest
        self.count += 1
        if len(self._buffer) == self._run_length * HASH_BYTES:
            self._write_run()

    def seal(self) -> None:
        """Write what is buffered. No hash can be added afterwards."""
        if self._files is not None:
            self._write_run()
        self.close()

    def close(self) -> None:
        self._stack.close()

    def in_order(self) -> Iterator[bytes]:
        """Every hash, in the order in which it was added."""
        if self._files is None:
            yield from _split(self._buffer)
        else:
            yield from _read_hashes(self._scratch.folder / _ORDER)

    def merged(self) -> Iterator[list[bytes]]:
        """The distinct hashes in ascending order, in blocks of about RUN_LENGTH.

        Cuts the hash space into equal ranges and sorts each range by itself. sha256 is uniform, so the ranges
        are about equally long. (Measured: half the time of merging the runs with a heap.)
        """
        if self._files is None:
            yield sorted(set(_split(self._buffer)))
            return
        with HashFile(self._scratch.folder / _RUNS) as file:
            runs = [file[start:end] for start, end in pairwise([0, *self._run_ends])]
            num_ranges = max(1, len(file) // self._run_length)
            for index in range(num_ranges):
                low, high = hash_at(index / num_ranges), hash_at((index + 1) / num_ranges)
                block: list[bytes] = []
                for run in runs:
                    block += _between(run, low, high)
                    file.release_pages()  # the kernel may map a whole run for one touched page
                # Timsort detects the runs and merges them; the dict keeps the order and drops duplicates.
                block.sort()
                yield list(dict.fromkeys(block))

    def _write_run(self) -> None:
        if not self._buffer:
            return
        if self._files is None:
            folder = self._scratch.folder
            self._files = (
                self._stack.enter_context((folder / _ORDER).open("wb")),
                self._stack.enter_context((folder / _RUNS).open("wb")),
            )
        order, runs = self._files
        order.write(self._buffer)
        run = sorted(set(_split(self._buffer)))
        runs.write(b"".join(run))
        self._run_ends.append(len(run) + (self._run_ends[-1] if self._run_ends else 0))
        self._buffer.clear()


def _read_hashes(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(HASH_BYTES << 12):
            yield from _split(block)


def _split(hashes: bytes | bytearray) -> Iterator[bytes]:
    return chain.from_iterable(iter_unpack(f"{HASH_BYTES}s", hashes))


def _between(run: Hashes, low: bytes, high: bytes) -> Hashes:
    return run[run.num_below(low) : run.num_below(high)]
