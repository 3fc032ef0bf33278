"""Packs: the documents of one data version as one stream of tokens, read in rows of fixed length.

``tokens.bin`` holds the stream, little endian. With sequence length S, row r is ``stream[r*S : r*S + S +
1]``: S inputs and S targets, shifted by one. The stream is padded with its own beginning until the last row
is full, so every token is a target at least once.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from service.core.errors import ArtifactCorrupt, StageInputInvalid
from workers.data.mixture import Ints
from workers.data.tokenizer import EncodedBlock

TOKENS = "tokens.bin"
HEADER = "pack.json"


@dataclass(frozen=True)
class PackHeader:
    """``tokens`` excludes the padding; ``text_bytes`` is the size of the documents in UTF-8."""

    sequence_length: int
    dtype: str  # numpy's name: "<u2" or "<u4"
    rows: int
    tokens: int
    documents: int
    text_bytes: int


def write_pack(
    directory: Path, blocks: Iterable[EncodedBlock], *, sequence_length: int, vocab_size: int
) -> PackHeader:
    """Write a pack from encoded documents. Raises StageInputInvalid if there are none."""
    dtype = np.dtype("<u2" if vocab_size < 1 << 16 else "<u4")
    head = np.empty(0, dtype)  # the first tokens, at most one row of them, which pad the end
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
    """Reads rows of a memory-mapped pack."""

    def __init__(self, folder: Path) -> None:
        self.header = PackHeader(**json.loads((folder / HEADER).read_text()))
        self._stream = np.memmap(folder / TOKENS, dtype=self.header.dtype, mode="r")
        if len(self._stream) != self.header.rows * self.header.sequence_length + 1:
            raise ArtifactCorrupt(
                f"{TOKENS} does not have the {self.header.rows} rows that {HEADER} declares"
            )

    @property
    def rows(self) -> int:
        return self.header.rows

    def row(self, index: int) -> Ints:
        """Return the tokens of one row, of shape (sequence_length + 1,)."""
        start = index * self.header.sequence_length
        return self._stream[start : start + self.header.sequence_length + 1].astype(np.int64)
