"""Reads documents from the published artifacts of data versions and slices: all, or those to train on."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from service.core.artifact_files import DOCUMENTS, HASHES, HOLDOUT_HASHES
from service.ingest.documents import Document, document_hash
from service.ingest.hash_file import HashFile
from service.ingest.line_file import read_lines

_BLOCK_HASHES = 1 << 16


def read_documents(folder: Path, file: str = DOCUMENTS) -> Iterator[Document]:
    """Documents of a verified artifact, in order, one in memory at a time.

    ``file`` is DOCUMENTS (all of a version or slice) or HOLDOUT.
    """
    for line in read_lines((folder / file).open("rb")):
        yield Document(**json.loads(line.decode()))


def training_documents(version: Path, earlier: Sequence[Path], slices: Sequence[Path]) -> Iterator[Document]:
    """Documents of a data version to train on, in order.

    Skips documents of earlier versions, repeated documents, the version's own holdout, and documents of
    uploaded evaluation sets. All arguments are folders of verified artifacts. ``earlier`` are the earlier
    versions that are not excluded *now*, possibly fewer than at registration. Takes one bit of memory per
    document.
    """
    with HashFile(version / HASHES) as hashes:
        skip = _bitmap(
            hashes, [version / HOLDOUT_HASHES, *(folder / HASHES for folder in (*earlier, *slices))]
        )
        for document in read_documents(version):
            index = hashes.find(document_hash(document.text))
            if index is None:
                raise ValueError(f"{version.name}: a document is not in {HASHES}")
            byte, bit = index >> 3, 1 << (index & 7)
            if not skip[byte] & bit:
                skip[byte] |= bit
                yield document


def _bitmap(hashes: HashFile, paths: Sequence[Path]) -> bytearray:
    """One bit per hash: whether it is in any of the hash files at ``paths``."""
    bits = bytearray((len(hashes) + 7) // 8)
    with ExitStack() as stack:
        others = [stack.enter_context(HashFile(path)) for path in paths]
        remaining = iter(hashes)
        start = 0
        while block := list(islice(remaining, _BLOCK_HASHES)):
            for other in others:
                for digest in other.among(block):
                    index = start + bisect_left(block, digest)
                    bits[index >> 3] |= 1 << (index & 7)
            start += len(block)
    return bits
