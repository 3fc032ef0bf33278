"""Which documents of a body are new, and which of the new ones are held out.

documents                          all of the body
└─ distinct                        one of each hash                      -> hashes.bin
   ├─ known                        in an earlier version
   └─ not known
      ├─ given                     in a given evaluation set
      └─ new (n of them)
         ├─ held out               the lowest hashes                     -> holdout.bin, holdout.ndjson.zst
         └─ trained on
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from service.core.artifact_files import DOCUMENTS, HASHES, HOLDOUT, HOLDOUT_HASHES
from service.core.errors import NothingNew
from service.ingest.digests import DigestSpool
from service.ingest.documents import CANDIDATES_BELOW, DocumentSpool
from service.ingest.hash_memory import Remembered
from service.ingest.hashfile import HASH_BYTES, HashFile
from service.ingest.lines import LineFile, read_lines
from service.ingest.scratch import Scratch


@dataclass(frozen=True)
class Division:
    """How many documents there are of each sort. ``given`` and ``new`` count distinct documents."""

    documents: int
    distinct: int
    known: int
    given: int
    new: int
    holdout: int

    @property
    def duplicates(self) -> int:
        """Documents that this body, before them, or an earlier version already has."""
        return self.documents - self.distinct + self.known


def holdout_size(fraction: float, documents: int) -> int:
    """How many of n new documents are held out: max(1, round(fraction × n)), never more than half."""
    return min(max(1, round(fraction * documents)), documents // 2) if fraction > 0 else 0


def write_hashes(digests: DigestSpool, scratch: Scratch) -> int:
    """Write ``hashes.bin``; return how many distinct documents there are."""
    distinct = 0
    with closing(scratch.create(HASHES)) as file:
        for block in digests.merged():
            file.write(b"".join(block))
            distinct += len(block)
    return distinct


def divide(
    digests: DigestSpool,
    earlier: Sequence[Path],
    given: Sequence[Path],
    fraction: float,
    scratch: Scratch,
    remembered: Remembered,
) -> Division:
    """Divide the documents of a body; writes ``hashes.bin`` and ``holdout.bin``.

    ``earlier`` and ``given`` are artifact folders of earlier versions and of given evaluation sets; ``remembered``
    has the hashes of the other earlier versions. Raises NothingNew where no document is new.
    """
    distinct = fresh = new = 0
    with ExitStack() as stack:
        earlier_hashes = [stack.enter_context(HashFile(folder / HASHES)) for folder in earlier]
        given_hashes = [stack.enter_context(HashFile(folder / HASHES)) for folder in given]
        hashes = stack.enter_context(closing(scratch.create(HASHES)))
        # The lowest new hashes are the holdout, but how many they are is known only when all are counted.
        lowest = stack.enter_context(closing(scratch.create(HOLDOUT_HASHES)))
        for block in digests.merged():
            hashes.write(b"".join(block))
            distinct += len(block)
            block = _without(block, [remembered, *earlier_hashes])
            fresh += len(block)
            block = _without(block, given_hashes)
            new += len(block)
            lowest.write(b"".join(block))
            for other in (*earlier_hashes, *given_hashes):
                other.forget()
        holdout = holdout_size(fraction, new)
        lowest.truncate(holdout * HASH_BYTES)
    if not fresh:
        raise NothingNew("every document of the body is already in the dataset")
    if not new:
        raise NothingNew("every new document of the body belongs to a given evaluation set")
    return Division(digests.count, distinct, distinct - fresh, fresh - new, new, holdout)


def write_holdout(spool: DocumentSpool, scratch: Scratch) -> None:
    """Write ``holdout.ndjson.zst``: the lines that are held out, the first of each hash, in order."""
    lines = LineFile(scratch.create(HOLDOUT))
    with closing(lines), HashFile(scratch.source(HOLDOUT_HASHES)) as holdout:
        missing = len(holdout)
        if missing:
            highest = holdout[-1]
            written = bytearray(missing)
            for digest, line in _documents_up_to(highest, spool, scratch):
                if digest > highest:
                    continue
                index = holdout.find(digest)
                if index is None or written[index]:
                    continue
                lines.write(line)
                written[index] = 1
                missing -= 1
                if not missing:
                    break
        lines.seal()


def _documents_up_to(highest: bytes, spool: DocumentSpool, scratch: Scratch) -> Iterator[tuple[bytes, bytes]]:
    """Hash and line of every document up to a hash, and maybe of others; in order."""
    if highest < CANDIDATES_BELOW:
        return spool.candidates.read()
    return zip(spool.digests.in_order(), read_lines(scratch.open(DOCUMENTS)), strict=True)


def _without(block: list[bytes], others: Sequence[HashFile | Remembered]) -> list[bytes]:
    for hashes in others:
        found = hashes.among(block)
        if found:
            block = [digest for digest in block if digest not in found]
    return block
