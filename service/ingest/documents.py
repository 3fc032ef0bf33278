"""Documents, and the file they are kept in: one normalised JSON object a line, compressed with zstd."""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard
from pydantic_core import to_json

from service.ingest.digests import DigestSpool
from service.ingest.findings import Flaw
from service.ingest.formats import Limits
from service.ingest.hashfile import hash_at

DOCUMENTS = "documents.ndjson.zst"
HASHES = "hashes.bin"
HOLDOUT = "holdout.ndjson.zst"
HOLDOUT_HASHES = "holdout.bin"

OPTIONAL_FIELDS = ("id", "date", "source")
FIELDS = ("text", *OPTIONAL_FIELDS)

# Level 1 makes text 2 to 3 times smaller at 4 ms a MiB; level 3 takes three times as long for a fifth less.
_LEVEL = 1
_BATCH_BYTES = 1 << 18


# The holdout of the default 2 % is in this range unless more than half of the documents are known. (Measured:
# to search all documents for it takes 2 s a GiB.)
CANDIDATES_BELOW = hash_at(0.04)


class Document(NamedTuple):
    text: str
    id: str | None = None
    date: str | None = None
    source: str | None = None


def document_hash(text: str) -> bytes:
    """Hash that identifies a document: sha256 of its text in UTF-8, whatever its other fields say."""
    return sha256(text.encode()).digest()


class LineFile:
    """Writes lines into a zstd file, in batches that depend on them alone: equal lines give equal bytes."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        self._file: BinaryIO = path.open("wb")
        compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True, threads=threads)
        self._compressor = compressor.compressobj()
        self._held: list[bytes] = []
        self._held_bytes = 0

    def write(self, line: bytes) -> None:
        """Add a line, given with its line end."""
        self._held.append(line)
        self._held_bytes += len(line)
        if self._held_bytes >= _BATCH_BYTES:
            self._flush()

    def seal(self) -> None:
        """Write what is held and end the zstd frame."""
        self._flush()
        self._file.write(self._compressor.flush())
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def _flush(self) -> None:
        self._file.write(self._compressor.compress(b"".join(self._held)))
        self._held = []
        self._held_bytes = 0


class DocumentSpool:
    """Where every reader puts its documents: checks them, writes them in order, and keeps their hashes.

    Documents whose hash is below CANDIDATES_BELOW are written a second time, by themselves: the holdout
    is nearly always among them, and need not be searched for in all documents.
    """

    def __init__(self, directory: Path, limits: Limits) -> None:
        self._max_document_bytes = limits.max_document_bytes
        # Compression is 5 of the 13 ms that a MiB takes, and can be on another core; the bytes are the same.
        self._lines = LineFile(directory / DOCUMENTS, threads=1)
        self.digests = DigestSpool(directory)
        self.candidates = Candidates(directory)

    def add(self, fields: Mapping[str, str]) -> None:
        """Add a document: ``text``, and of OPTIONAL_FIELDS those it has, in that order; no lone surrogates.

        Raises Flaw, and adds nothing, where the text is empty or too long or a NUL is anywhere.
        """
        text = fields["text"]
        if not text or text.isspace():
            raise Flaw("the text is empty")
        raw = text.encode()
        if len(raw) > self._max_document_bytes:
            raise Flaw(f"the text is longer than {self._max_document_bytes} bytes")
        for name, value in fields.items():
            if "\0" in value:
                raise Flaw(f"{'the text' if name == 'text' else f'field {name!r}'} contains a NUL character")
        # (Measured: this and the parser's from_json take half the time of the standard library's json.)
        line = to_json(fields) + b"\n"
        digest = sha256(raw).digest()
        self._lines.write(line)
        self.digests.add(digest)
        if digest < CANDIDATES_BELOW:
            self.candidates.add(digest, line)

    def seal(self) -> None:
        self._lines.seal()
        self.digests.seal()
        self.candidates.seal()

    def close(self) -> None:
        self._lines.close()
        self.digests.close()
        self.candidates.close()


class Candidates:
    """The documents with the lowest hashes, in order: their lines, and their hashes beside them."""

    def __init__(self, directory: Path) -> None:
        self.lines_path = directory / "candidates.ndjson.zst"
        self.order_path = directory / "candidates.bin"
        self._lines = LineFile(self.lines_path)
        self._order: BinaryIO = self.order_path.open("wb")

    def add(self, digest: bytes, line: bytes) -> None:
        self._lines.write(line)
        self._order.write(digest)

    def seal(self) -> None:
        self._lines.seal()
        self._order.close()

    def close(self) -> None:
        self._lines.close()
        self._order.close()
