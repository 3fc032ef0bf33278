"""Documents, and the spool that writes them as one normalized JSON object per line, compressed with zstd."""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import chain
from typing import BinaryIO, NamedTuple

from pydantic_core import to_json

from service.core.artifact_files import DOCUMENTS
from service.ingest.formats import Limits
from service.ingest.hash_file import HASH_BYTES, hash_at
from service.ingest.hash_spool import HashSpool
from service.ingest.line_file import BATCH_BYTES, LineFile
from service.ingest.scratch import Scratch
from service.ingest.validation import RowError

_CANDIDATES = "candidates.bin"

OPTIONAL_FIELDS = ("id", "date", "source")
FIELDS = ("text", *OPTIONAL_FIELDS)

# The default holdout of 2 % lies below this hash unless more than half of the documents are known.
# (Measured: searching all documents for the holdout takes 2 s per GiB.)
CANDIDATES_BELOW = hash_at(0.04)


class Document(NamedTuple):
    text: str
    id: str | None = None
    date: str | None = None
    source: str | None = None


def document_hash(text: str) -> bytes:
    """The hash that identifies a document: sha256 of its text in UTF-8. Other fields don't count."""
    return sha256(text.encode()).digest()


class DocumentSpool:
    """Receives documents from a parser, checks them, writes them in order, and collects their hashes.

    Documents whose hash is below CANDIDATES_BELOW are also written to a file of their own. The holdout is
    nearly always among them, so the other documents rarely have to be searched.
    """

    def __init__(self, scratch: Scratch, limits: Limits) -> None:
        self._max_document_bytes = limits.max_document_bytes
        # Compression takes 5 of the 13 ms per MiB and can run on another core.
        self._lines = LineFile(scratch.create(DOCUMENTS), threaded=True)
        self.hashes = HashSpool(scratch)
        self.candidates = Candidates(scratch)

    def add(self, fields: Mapping[str, str]) -> None:
        """Add a document: ``text``, then the OPTIONAL_FIELDS that it has, in that order; no lone surrogates.

        Raises RowError, and adds nothing, if the text is empty or too long or any field contains a NUL.
        """
        text = fields["text"]
        if not text or text.isspace():
            raise RowError("the text is empty")
        raw = text.encode()
        if len(raw) > self._max_document_bytes:
            raise RowError(f"the text is longer than {self._max_document_bytes} bytes")
        for name, value in fields.items():
            if "\0" in value:
                where = "the text" if name == "text" else f"field {name!r}"
                raise RowError(f"{where} contains a NUL character")
        # (Measured: to_json here and from_json in the parser take half the time of the json module.)
        line = to_json(fields) + b"\n"
        digest = sha256(raw).digest()
        self._lines.write(line)
        self.hashes.add(digest)
        if digest < CANDIDATES_BELOW:
            self.candidates.add(digest, line)

    def seal(self) -> None:
        self._lines.seal()
        self.hashes.seal()
        self.candidates.seal()

    def close(self) -> None:
        self._lines.close()
        self.hashes.close()
        self.candidates.close()


class Candidates:
    """Lines and hashes of the documents with the lowest hashes, in body order.

    A short body never creates a file. The file is not compressed: it is a few percent of the body and is
    deleted again, while a compressor takes 1 MiB of memory.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._file: BinaryIO | None = None
        self._buffer: list[tuple[bytes, bytes]] = []
        self._buffer_bytes = 0

    def add(self, digest: bytes, line: bytes) -> None:
        self._buffer.append((digest, line))
        self._buffer_bytes += len(line)
        if self._buffer_bytes >= BATCH_BYTES:
            self._write_buffer()

    def seal(self) -> None:
        if self._file is not None:
            self._write_buffer()
        self.close()

    def read(self) -> Iterator[tuple[bytes, bytes]]:
        """Hash and line of each candidate. Call ``seal`` first."""
        if self._file is None:
            yield from self._buffer
            return
        with (self._scratch.folder / _CANDIDATES).open("rb") as file:
            while digest := file.read(HASH_BYTES):
                yield digest, file.readline()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write_buffer(self) -> None:
        if self._file is None:
            self._file = (self._scratch.folder / _CANDIDATES).open("wb")
        self._file.writelines(chain.from_iterable(self._buffer))
        self._buffer, self._buffer_bytes = [], 0
