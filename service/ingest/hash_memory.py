"""Which documents the small versions of datasets have, kept in memory: otherwise a file of each would have to be opened."""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Versions of more documents are looked up in their files, of which there are few.
SMALL_DOCUMENTS = 1000

# In all, at about 200 bytes each.
MAX_HASHES = 1 << 18

# Datasets that are used at the same time must not throw each other out, for each would be read again every time.
KEPT_SECONDS = 60.0


class VersionHashes(NamedTuple):
    """A data version, its artifact, and the hashes of its documents: None where they are more than SMALL_DOCUMENTS."""

    number: int
    key: str
    hashes: Sequence[bytes] | None


@dataclass(frozen=True)
class Remembered:
    """The documents that small versions have, up to the version ``newest``.

    ``others`` are those up to there that are not in memory: number and artifact. What was added to the memory since is
    not seen.
    """

    newest: int = 0
    others: tuple[tuple[int, str], ...] = ()
    first: dict[bytes, int] = field(default_factory=dict)

    def among(self, block: Sequence[bytes]) -> set[bytes]:
        """Those of a block of hashes that are in here."""
        return {digest for digest in block if 0 < self.first.get(digest, 0) <= self.newest}

    def has_since(self, after: int, hashes: Iterable[bytes]) -> bool:
        """Whether a version above ``after`` was the first to have one of the few hashes."""
        return any(after < self.first.get(digest, 0) <= self.newest for digest in hashes)

    def since(self, after: int) -> list[bytes]:
        """Hashes that a version above ``after`` was the first to have, sorted. It looks through all that are remembered."""
        # Copied at once, for others may be adding to it.
        return sorted(digest for digest, number in list(self.first.items()) if after < number <= self.newest)


NOTHING = Remembered()


@dataclass
class _Dataset:
    """``excluded``: how many of its versions were. ``first``: hash -> the first version that has it."""

    excluded: int
    newest: int = 0
    first: dict[bytes, int] = field(default_factory=dict)
    others: list[tuple[int, str]] = field(default_factory=list)
    used_at: float = field(default_factory=time.monotonic)


class HashMemory:
    """Keeps the datasets that were asked for last. Versions are immutable, so that nothing in here becomes wrong.

    For several threads at once.
    """

    def __init__(self, max_hashes: int = MAX_HASHES) -> None:
        self._max_hashes = max_hashes
        self._held = 0
        self._datasets: OrderedDict[str, _Dataset] = OrderedDict()
        self._lock = threading.Lock()

    def newest(self, dataset_id: str, excluded: int) -> int:
        """Up to which version the dataset with that many excluded versions is known; 0 where it is not."""
        with self._lock:
            known = self._datasets.get(dataset_id)
            return known.newest if known is not None and known.excluded == excluded else 0

    def add(
        self, dataset_id: str, excluded: int, after: int, newest: int, versions: Iterable[VersionHashes]
    ) -> None:
        """Add all versions above ``after`` up to ``newest`` that are not excluded, in order of number.

        What others have added meanwhile is passed over, and what does not follow on what is known is not added.
        """
        with self._lock:
            known = self._datasets.get(dataset_id)
            if known is None or known.excluded < excluded:
                self._forget(dataset_id)
                known = self._datasets[dataset_id] = _Dataset(excluded)
            self._use(dataset_id)
            if known.excluded != excluded or not after <= known.newest < newest:
                return
            for number, key, hashes in versions:
                if number <= known.newest:
                    continue
                if hashes is None or not self._has_room(dataset_id, len(hashes)):
                    known.others.append((number, key))
                    continue
                before = len(known.first)
                for digest in hashes:
                    known.first.setdefault(digest, number)
                self._held += len(known.first) - before
            known.newest = newest

    def remembered(self, dataset_id: str, excluded: int, newest: int) -> Remembered | None:
        """What is known of the versions up to ``newest``; None where that is not all of them."""
        with self._lock:
            known = self._datasets.get(dataset_id)
            if known is None or known.excluded != excluded or known.newest < newest:
                return None
            self._use(dataset_id)
            others = tuple(other for other in known.others if other[0] <= newest)
            return Remembered(newest, others, known.first)

    def _has_room(self, dataset_id: str, count: int) -> bool:
        """Make room for that many hashes, if there is any without those of this dataset and of those in use."""
        while self._held + count > self._max_hashes:
            oldest = next(iter(self._datasets))
            if oldest == dataset_id or time.monotonic() - self._datasets[oldest].used_at < KEPT_SECONDS:
                return False
            self._forget(oldest)
        return True

    def _use(self, dataset_id: str) -> None:
        self._datasets[dataset_id].used_at = time.monotonic()
        self._datasets.move_to_end(dataset_id)

    def _forget(self, dataset_id: str) -> None:
        known = self._datasets.pop(dataset_id, None)
        if known is not None:
            self._held -= len(known.first)
