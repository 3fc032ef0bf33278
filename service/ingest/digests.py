"""The hashes of a body's documents, spooled while it streams: in body order, and as sorted runs."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, pairwise
from pathlib import Path
from struct import iter_unpack
from typing import BinaryIO

from service.ingest.hashfile import HASH_BYTES, Hashes, HashFile, hash_at
from service.ingest.scratch import Scratch

# Hashes that are sorted at once, for which 65,536 bytes objects take about 6 MB. What waits for that takes 2 MB.
RUN_LENGTH = 1 << 16

_ORDER = "order.bin"
_RUNS = "runs.bin"


class DigestSpool:
    """Takes hashes one by one in flat memory. ``seal`` it, then read it, in order or merged.

    Those of a short body, of less than a run, never become a file.
    """

    def __init__(self, scratch: Scratch, run_length: int = RUN_LENGTH) -> None:
        self.count = 0
        self._run_length = run_length
        self._scratch = scratch
        self._files: tuple[BinaryIO, BinaryIO] | None = None
        self._stack = ExitStack()
        self._ends: list[int] = []  # where each run ends in runs.bin, in hashes
        self._held = bytearray()

    def add(self, digest: bytes) -> None:
        self._held += digest
        self.count += 1
        if len(self._held) == self._run_length * HASH_BYTES:
            self._spool()

    def seal(self) -> None:
        """Write what is held. Nothing can be added after."""
        if self._files is not None:
            self._spool()
        self.close()

    def close(self) -> None:
        self._stack.close()

    def in_order(self) -> Iterator[bytes]:
        """Every hash that was added, as it was."""
        if self._files is None:
            yield from _split(self._held)
        else:
            yield from read_digests(self._scratch.folder / _ORDER)

    def merged(self) -> Iterator[list[bytes]]:
        """The distinct hashes in ascending order, in blocks of about RUN_LENGTH.

        The space of hashes is cut into equal ranges, and each range is sorted by itself: sha256 is uniform,
        so that no range is much longer than another. (Measured: half the time of a heap over the runs.)
        """
        if self._files is None:
            yield sorted(set(_split(self._held)))
            return
        with HashFile(self._scratch.folder / _RUNS) as file:
            runs = [file[start:end] for start, end in pairwise([0, *self._ends])]
            parts = max(1, len(file) // self._run_length)
            for part in range(parts):
                low, high = hash_at(part / parts), hash_at((part + 1) / parts)
                block: list[bytes] = []
                for run in runs:
                    block += _between(run, low, high)
                    file.forget()  # a page that is touched may bring along all of its run
                # Sorting finds the runs and merges them; a dict keeps the order and drops the equal ones.
                block.sort()
                yield list(dict.fromkeys(block))

    def _spool(self) -> None:
        if not self._held:
            return
        if self._files is None:
            folder = self._scratch.folder
            self._files = (
                self._stack.enter_context((folder / _ORDER).open("wb")),
                self._stack.enter_context((folder / _RUNS).open("wb")),
            )
        order, runs = self._files
        order.write(self._held)
        run = sorted(set(_split(self._held)))
        runs.write(b"".join(run))
        self._ends.append(len(run) + (self._ends[-1] if self._ends else 0))
        self._held.clear()


def read_digests(path: Path) -> Iterator[bytes]:
    """Hashes of a file that is not sorted, one after the other."""
    with path.open("rb") as file:
        while block := file.read(HASH_BYTES << 12):
            yield from _split(block)


def _split(digests: bytes | bytearray) -> Iterator[bytes]:
    return chain.from_iterable(iter_unpack(f"{HASH_BYTES}s", digests))


def _between(run: Hashes, low: bytes, high: bytes) -> Hashes:
    return run[run.below(low) : run.below(high)]
