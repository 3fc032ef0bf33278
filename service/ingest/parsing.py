"""The decoded body to documents: newline-delimited JSON and plain text."""

import json
import re
from typing import Any, NoReturn, Protocol

from pydantic_core import from_json

from service.ingest.documents import FIELDS, OPTIONAL_FIELDS, DocumentSpool
from service.ingest.findings import Findings, Flaw
from service.ingest.formats import Limits

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# JSON beside strings (brackets, commas, numbers) becomes Python objects of up to 24 times its size, so that
# no more of it than this is parsed in one line. A string becomes about itself.
MAX_STRUCTURE_BYTES = 1 << 20
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)


class Parser(Protocol):
    """Takes the decoded body piece by piece; its documents go into a spool, its flaws into findings."""

    def feed(self, piece: bytes) -> None: ...

    def end(self) -> None:
        """Take what is held as the last document. Nothing can be fed after."""
        ...

    def close(self) -> None:
        """Let go of files and processes, ended or not."""
        ...


class Held:
    """What has come of a line or document that goes on; of one that is too long, what shows that."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = bytearray()

    def add(self, part: bytes) -> None:
        if len(self._bytes) <= self._limit:
            self._bytes += part

    def take(self) -> bytes:
        taken = bytes(self._bytes)
        self._bytes = bytearray()
        return taken


class NdjsonParser:
    """One JSON object a line. Blank lines, and a byte order mark before the first, are passed over.

    Of a key that an object has twice the last counts, as everywhere in Python.
    """

    def __init__(self, spool: DocumentSpool, findings: Findings, limits: Limits) -> None:
        self._spool = spool
        self._findings = findings
        self._max_line_bytes = limits.max_line_bytes
        self._held = Held(limits.max_line_bytes)
        self._lines = 0

    def feed(self, piece: bytes) -> None:
        lines = piece.split(b"\n")
        self._held.add(lines[0])
        if len(lines) == 1:
            return
        lines[0] = self._held.take()
        self._held.add(lines.pop())
        for number, line in enumerate(lines, self._lines + 1):
            if line:
                self._take(number, line)
        self._lines += len(lines)

    def end(self) -> None:
        self._take(self._lines + 1, self._held.take())

    def close(self) -> None:
        return

    def _take(self, number: int, line: bytes) -> None:
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line or line.isspace():
            return
        try:
            if len(line) > self._max_line_bytes:
                raise Flaw(f"the line is longer than {self._max_line_bytes} bytes")
            self._spool.add(_fields(_value(line)))
        except Flaw as flaw:
            self._findings.add(f"line {number}", str(flaw))


def _value(line: bytes) -> Any:
    if len(line) > MAX_STRUCTURE_BYTES and len(_STRINGS.sub(b"", line)) > MAX_STRUCTURE_BYTES:
        raise Flaw(f"the line has more than {MAX_STRUCTURE_BYTES} bytes of JSON beside strings")
    try:
        return from_json(line, allow_inf_nan=False, cache_strings="none")
    except ValueError:
        return _value_or_why_not(line)


def _value_or_why_not(line: bytes) -> Any:
    """Read a line that the fast parser refuses with the standard library's, which says why."""
    try:
        value = json.loads(line.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Flaw(f"not valid UTF-8 at byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise Flaw(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise Flaw("not valid JSON: nested too deeply") from error
    except ValueError as error:  # NaN, Infinity, a number of thousands of digits
        raise Flaw("not valid JSON: a number out of range") from error
    # JSON may escape half of a surrogate pair, UTF-8 may not.
    for name in FIELDS:
        field = value.get(name) if type(value) is dict else None
        if type(field) is str and _LONE_SURROGATE.search(field):
            raise Flaw(f"field '{name}' contains a lone surrogate, which is not a character")
    return value


def _fields(value: Any) -> dict[str, str]:
    if type(value) is not dict:
        raise Flaw("not a JSON object")
    if "text" not in value:
        raise Flaw("no field 'text'")
    fields = {"text": value["text"]}
    for name in OPTIONAL_FIELDS:
        field = value.get(name)
        if field is not None:
            fields[name] = field
    for name, field in fields.items():
        if type(field) is not str:
            raise Flaw(f"field '{name}' is not a string")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


class TextParser:
    """Documents separated by form feeds; blank ones between two separators are passed over.

    The text of a document is what lies between the separators, unchanged but for a byte order mark at the
    beginning.
    """

    def __init__(self, spool: DocumentSpool, findings: Findings, limits: Limits) -> None:
        self._spool = spool
        self._findings = findings
        # One byte order mark more, so that dropping it does not make a document that is too long look short.
        self._held = Held(limits.max_document_bytes + len(BYTE_ORDER_MARK))
        self._first = True
        self._line = 1
        self._begun_at = 1

    def feed(self, piece: bytes) -> None:
        first, *others = piece.split(b"\f")
        self._add(first)
        for part in others:
            self.end()
            self._add(part)

    def end(self) -> None:
        raw = self._held.take()
        if self._first:
            raw, self._first = raw.removeprefix(BYTE_ORDER_MARK), False
        self._take(raw)
        self._begun_at = self._line

    def close(self) -> None:
        return

    def _add(self, part: bytes) -> None:
        self._held.add(part)
        self._line += part.count(b"\n")

    def _take(self, raw: bytes) -> None:
        at = 0
        try:
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                at = error.start
                raise Flaw("not valid UTF-8") from error
            if text and not text.isspace():
                at = max(0, raw.find(b"\0"))
                self._spool.add({"text": text})
        except Flaw as flaw:
            line = self._begun_at + raw.count(b"\n", 0, at)
            self._findings.add(f"line {line}", str(flaw))
