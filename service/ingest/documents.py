"""Documents, and the file they are kept in: one normalised JSON object a line, compressed with zstd."""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import chain
from typing import BinaryIO, NamedTuple

from pydantic_core import to_json

from service.core.artifact_files import DOCUMENTS
from service.ingest.digests import DigestSpool
from service.ingest.findings import Flaw
from service.ingest.formats import Limits
from service.ingest.hashfile import HASH_BYTES, hash_at
from service.ingest.lines import BATCH_BYTES, LineFile
from service.ingest.scratch import Scratch

_CANDIDATES = "candidates.bin"

OPTIONAL_FIELDS = ("id", "date", "source")
FIELDS = ("text", *OPTIONAL_FIELDS)

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


class DocumentSpool:
    """Where every reader puts its documents: checks them, writes them in order, and keeps their hashes.

    Documents whose hash is below CANDIDATES_BELOW are written a second time, by themselves: the holdout
    is nearly always among them, and need not be searched for in all documents.
    """

    def __init__(self, scratch: Scratch, limits: Limits) -> None:
        self._max_document_bytes = limits.max_document_bytes
        # Compression is 5 of the 13 ms that a MiB takes, and can be on another core.
        self._lines = LineFile(scratch.create(DOCUMENTS), beside=True)
        self.digests = DigestSpool(scratch)
        self.candidates = Candidates(scratch)

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
    """The documents with the lowest hashes, in order: lines and hashes. Those of a short body never become a file.

    Not compressed: it is the share of a few percent of a body that is thrown away again, and every compressor takes 1 MiB.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._file: BinaryIO | None = None
        self._held: list[tuple[bytes, bytes]] = []
        self._held_bytes = 0

    def add(self, digest: bytes, line: bytes) -> None:
        self._held.append((digest, line))
        self._held_bytes += len(line)
        if self._held_bytes >= BATCH_BYTES:
            self._spool()

    def seal(self) -> None:
        if self._file is not None:
            self._spool()
        self.close()

    def read(self) -> Iterator[tuple[bytes, bytes]]:
        """Hash and line of each. To be sealed before."""
        if self._file is None:
            yield from self._held
            return
        with (self._scratch.folder / _CANDIDATES).open("rb") as file:
            while digest := file.read(HASH_BYTES):
                yield digest, file.readline()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _spool(self) -> None:
        if self._file is None:
            self._file = (self._scratch.folder / _CANDIDATES).open("wb")
        self._file.writelines(chain.from_iterable(self._held))
        self._held, self._held_bytes = [], 0
