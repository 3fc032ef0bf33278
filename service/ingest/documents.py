"""Documents, and the file they are kept in: one normalised JSON object a line, compressed with zstd."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydantic_core import to_json

from service.ingest.digests import DigestSpool, read_digests
from service.ingest.findings import Flaw
from service.ingest.formats import Limits
from service.ingest.hashfile import hash_at
from service.ingest.lines import BATCH_BYTES, LineFile, read_lines

DOCUMENTS = "documents.ndjson.zst"
HASHES = "hashes.bin"
HOLDOUT = "holdout.ndjson.zst"
HOLDOUT_HASHES = "holdout.bin"

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
    """The documents with the lowest hashes, in order: lines and hashes. Those of a short body never become a file."""

    def __init__(self, directory: Path) -> None:
        self._lines_path = directory / "candidates.ndjson.zst"
        self._order_path = directory / "candidates.bin"
        self._files: tuple[LineFile, BinaryIO] | None = None
        self._stack = ExitStack()
        self._held: list[tuple[bytes, bytes]] = []
        self._held_bytes = 0

    def add(self, digest: bytes, line: bytes) -> None:
        self._held.append((digest, line))
        self._held_bytes += len(line)
        if self._held_bytes >= BATCH_BYTES:
            self._spool()

    def seal(self) -> None:
        if self._files is not None:
            self._spool()
            self._files[0].seal()
        self.close()

    def read(self) -> Iterator[tuple[bytes, bytes]]:
        """Hash and line of each. To be sealed before."""
        if self._files is None:
            return iter(self._held)
        return zip(read_digests(self._order_path), read_lines(self._lines_path), strict=True)

    def close(self) -> None:
        self._stack.close()

    def _spool(self) -> None:
        if self._files is None:
            lines = self._stack.enter_context(closing(LineFile(self._lines_path)))
            self._files = lines, self._stack.enter_context(self._order_path.open("wb"))
        lines, order = self._files
        for digest, line in self._held:
            lines.write(line)
            order.write(digest)
        self._held, self._held_bytes = [], 0
