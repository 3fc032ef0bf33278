"""What the artifacts of a data version or a slice hold, read back: all documents, and those trained on."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from service.core.artifact_files import DOCUMENTS, HASHES, HOLDOUT_HASHES
from service.ingest.documents import Document, document_hash
from service.ingest.hashfile import HashFile
from service.ingest.lines import read_lines

_BLOCK_HASHES = 1 << 16


def read_documents(folder: Path, file: str = DOCUMENTS) -> Iterator[Document]:
    """Documents of a verified artifact, in order, one in memory at a time.

    ``file`` is DOCUMENTS (all of a version or slice) or HOLDOUT.
    """
    for line in read_lines((folder / file).open("rb")):
        yield Document(**json.loads(line.decode()))


def training_documents(version: Path, earlier: Sequence[Path], slices: Sequence[Path]) -> Iterator[Document]:
    """Documents of a data version that are trained on, in order.

    Left out are those that an earlier version has, the second and later of equal ones, the version's own
    holdout, and those of given evaluation sets. All arguments are verified artifact folders; ``earlier`` are
    those of the versions before it that are not excluded *now*, which may be fewer than when it was
    registered. Memory: one bit a document.
    """
    with HashFile(version / HASHES) as hashes:
        taken = _left_out(
            hashes, [version / HOLDOUT_HASHES, *(folder / HASHES for folder in (*earlier, *slices))]
        )
        for document in read_documents(version):
            index = hashes.find(document_hash(document.text))
            if index is None:
                raise ValueError(f"{version.name}: a document is not in {HASHES}")
            byte, bit = index >> 3, 1 << (index & 7)
            if not taken[byte] & bit:
                taken[byte] |= bit
                yield document


def _left_out(hashes: HashFile, paths: Sequence[Path]) -> bytearray:
    """One bit for each of ``hashes``: whether it is in any of the hash files at ``paths``."""
    bits = bytearray((len(hashes) + 7) // 8)
    with ExitStack() as stack:
        others = [stack.enter_context(HashFile(path)) for path in paths]
        digests = iter(hashes)
        start = 0
        while block := list(islice(digests, _BLOCK_HASHES)):
            for other in others:
                for digest in other.among(block):
                    index = start + bisect_left(block, digest)
                    bits[index >> 3] |= 1 << (index & 7)
            start += len(block)
    return bits
