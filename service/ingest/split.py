"""Splits the documents of a body: which are new to the dataset, and which of those are held out.

documents                          all documents of the body
└─ distinct                        one per hash                          -> hashes.bin
   ├─ known                        already in an earlier version
   └─ not known
      ├─ uploaded                  in an uploaded evaluation set
      └─ new
         ├─ held out               the lowest hashes                     -> holdout.bin, holdout.ndjson.zst
         └─ trained on
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from service.core.artifact_files import DOCUMENTS, HASHES, HOLDOUT, HOLDOUT_HASHES
from service.core.errors import NothingNew
from service.ingest.documents import CANDIDATES_BELOW, DocumentSpool
from service.ingest.hash_file import HASH_BYTES, HashFile, HashSet
from service.ingest.hash_spool import HashSpool
from service.ingest.line_file import LineFile, read_lines
from service.ingest.scratch import Scratch


@dataclass(frozen=True)
class Split:
    """Counts of a split. ``duplicates`` appear earlier in the body or in an earlier version."""

    duplicates: int
    holdout: int


def holdout_size(fraction: float, num_new: int) -> int:
    """How many of the new documents are held out: max(1, round(fraction × n)), at most half of them."""
    return min(max(1, round(fraction * num_new)), num_new // 2) if fraction > 0 else 0


def write_hashes(hashes: HashSpool, scratch: Scratch) -> int:
    """Write ``hashes.bin``; return the number of distinct documents."""
    distinct = 0
    with closing(scratch.create(HASHES)) as file:
        for block in hashes.merged():
            file.write(b"".join(block))
            distinct += len(block)
    return distinct


def split_body(
    hashes: HashSpool,
    cached: HashSet | None,
    earlier: Sequence[Path],
    uploaded: Sequence[Path],
    holdout_fraction: float,
    scratch: Scratch,
) -> Split:
    """Split the documents of a body; writes ``hashes.bin`` and ``holdout.bin``.

    ``earlier`` and ``uploaded`` are the artifact folders of earlier versions and of uploaded evaluation sets;
    ``cached`` holds the hashes of the other earlier versions. Raises NothingNew if no document is new.
    """
    unknown = new = 0
    with ExitStack() as stack:
        earlier_files = [stack.enter_context(HashFile(folder / HASHES)) for folder in earlier]
        uploaded_files = [stack.enter_context(HashFile(folder / HASHES)) for folder in uploaded]
        known: list[HashSet] = [*earlier_files] if cached is None else [cached, *earlier_files]
        all_hashes = stack.enter_context(closing(scratch.create(HASHES)))
        # The holdout is the lowest new hashes. Its size is known only at the end, so write all and truncate.
        lowest = stack.enter_context(closing(scratch.create(HOLDOUT_HASHES)))
        for block in hashes.merged():
            all_hashes.write(b"".join(block))
            block = _without(block, known)
            unknown += len(block)
            block = _without(block, uploaded_files)
            new += len(block)
            lowest.write(b"".join(block))
            for file in (*earlier_files, *uploaded_files):
                file.release_pages()
        holdout = holdout_size(holdout_fraction, new)
        lowest.truncate(holdout * HASH_BYTES)
    if not unknown:
        raise NothingNew("every document of the body is already in the dataset")
    if not new:
        raise NothingNew("every new document of the body is in an uploaded evaluation set")
    return Split(duplicates=hashes.count - unknown, holdout=holdout)


def write_holdout(spool: DocumentSpool, scratch: Scratch) -> None:
    """Write ``holdout.ndjson.zst``: the first document of each held-out hash, in body order."""
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
    """Hash and line of every document up to a hash, in body order; possibly of others too."""
    if highest < CANDIDATES_BELOW:
        return spool.candidates.read()
    return zip(spool.hashes.in_order(), read_lines(scratch.open(DOCUMENTS)), strict=True)


def _without(block: list[bytes], others: Sequence[HashSet]) -> list[bytes]:
    for other in others:
        common = other.among(block)
        if common:
            block = [digest for digest in block if digest not in common]
    return block
