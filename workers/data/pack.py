"""Packs: the documents of one data version as one stream of tokens, read in rows of fixed length.

``tokens.bin`` holds the tokens, little endian; row r is ``stream[r*S : r*S + S + 1]``: S inputs and the S
targets that follow them. The stream is closed to a ring, its end filled up from its beginning, so that
every token is a target at least once and all rows are full.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.core.errors import ArtifactCorrupt, StageInputInvalid
from workers.data.tokenizer import EncodedBlock

TOKENS = "tokens.bin"
HEADER = "pack.json"

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class PackHeader:
    """``tokens`` is counted without the filling; ``text_bytes`` are the documents' in UTF-8."""

    sequence_length: int
    dtype: str  # of numpy: "<u2" or "<u4"
    rows: int
    tokens: int
    documents: int
    text_bytes: int


def write_pack(
    directory: Path, blocks: Iterable[EncodedBlock], *, sequence_length: int, vocab_size: int
) -> PackHeader:
    """Write the pack of the documents in ``blocks``. Raises StageInputInvalid if there are none."""
    dtype = np.dtype("<u2" if vocab_size < 1 << 16 else "<u4")
    head = np.empty(0, dtype)  # what the end is filled up from: at most one row's length
    tokens = documents = text_bytes = 0
    with (directory / TOKENS).open("wb") as file:
        for block in blocks:
            ids = block.ids.astype(dtype)
            if len(head) < sequence_length:
                head = np.concatenate([head, ids[: sequence_length - len(head)]])
            ids.tofile(file)
            tokens += len(ids)
            documents += block.documents
            text_bytes += block.text_bytes
        if not documents:
            raise StageInputInvalid("the data version has no document to train on")
        rows = -(-tokens // sequence_length)
        np.resize(head, rows * sequence_length + 1 - tokens).tofile(file)
    header = PackHeader(sequence_length, dtype.str, rows, tokens, documents, text_bytes)
    (directory / HEADER).write_text(json.dumps(asdict(header), indent=1))
    return header


class Pack:
    """The rows of a pack, read where they lie."""

    def __init__(self, folder: Path) -> None:
        self.header = PackHeader(**json.loads((folder / HEADER).read_text()))
        self._stream = np.memmap(folder / TOKENS, dtype=self.header.dtype, mode="r")
        if len(self._stream) != self.header.rows * self.header.sequence_length + 1:
            raise ArtifactCorrupt(f"{TOKENS} does not hold {self.header.rows} rows")

    @property
    def rows(self) -> int:
        return self.header.rows

    def row(self, index: int) -> Ints:
        """Tokens of one row, shape (sequence_length + 1,)."""
        start = index * self.header.sequence_length
        return self._stream[start : start + self.header.sequence_length + 1].astype(np.int64)
