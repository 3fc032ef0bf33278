"""Parsers from the decoded body to documents: newline-delimited JSON and plain text."""

import json
import re
from typing import Any, NoReturn, Protocol

from pydantic_core import from_json

from service.ingest.documents import FIELDS, OPTIONAL_FIELDS, DocumentSpool
from service.ingest.formats import Limits
from service.ingest.validation import RowError, RowErrors

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# JSON outside strings (brackets, commas, numbers) becomes Python objects of up to 24 times its size, so the
# parser accepts at most this much of it in one line. Strings keep about their size.
MAX_STRUCTURE_BYTES = 1 << 20
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)


class Parser(Protocol):
    """Takes the decoded body piece by piece, and puts documents into a spool and errors into RowErrors."""

    def feed(self, piece: bytes) -> None: ...

    def end(self) -> None:
        """Parse what is buffered as the last document. Nothing can be fed afterwards."""
        ...

    def close(self) -> None:
        """Release files and processes, whether or not the body has ended."""
        ...


class LineBuffer:
    """Buffers an unfinished line or document. Stops growing soon after the limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = bytearray()

    def add(self, part: bytes) -> None:
        if len(self._bytes) <= self._limit:
            self._bytes += part

    def take(self) -> bytes:
        """Return the content and start again."""
        content = bytes(self._bytes)
        self._bytes = bytearray()
        return content


class NdjsonParser:
    """Parses one JSON object per line. Skips blank lines and a byte order mark before the first line.

    If an object has a key twice, the last one counts, as in the json module.
    """

    def __init__(self, spool: DocumentSpool, errors: RowErrors, limits: Limits) -> None:
        self._spool = spool
        self._errors = errors
        self._max_line_bytes = limits.max_line_bytes
        self._unfinished = LineBuffer(limits.max_line_bytes)
        self._num_lines = 0

    def feed(self, piece: bytes) -> None:
        lines = piece.split(b"\n")
        self._unfinished.add(lines[0])
        if len(lines) == 1:
            return
        lines[0] = self._unfinished.take()
        self._unfinished.add(lines.pop())
        for number, line in enumerate(lines, self._num_lines + 1):
            if line:
                self._parse(number, line)
        self._num_lines += len(lines)

    def end(self) -> None:
        self._parse(self._num_lines + 1, self._unfinished.take())

    def close(self) -> None:
        return

    def _parse(self, number: int, line: bytes) -> None:
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line or line.isspace():
            return
        try:
            if len(line) > self._max_line_bytes:
                raise RowError(f"the line is longer than {self._max_line_bytes} bytes")
            self._spool.add(_fields(_parse_json(line)))
        except RowError as error:
            self._errors.add(f"line {number}", str(error))


def _parse_json(line: bytes) -> Any:
    if len(line) > MAX_STRUCTURE_BYTES and len(_STRINGS.sub(b"", line)) > MAX_STRUCTURE_BYTES:
        raise RowError(f"the line has more than {MAX_STRUCTURE_BYTES} bytes of JSON outside strings")
    try:
        return from_json(line, allow_inf_nan=False, cache_strings="none")
    except ValueError:
        return _parse_json_or_explain(line)


def _parse_json_or_explain(line: bytes) -> Any:
    """Parse a line that the fast parser rejected, with the json module, because its errors are more precise."""
    try:
        value = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RowError(f"not valid UTF-8 at byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise RowError("not valid JSON: nested too deeply") from error
    except ValueError as error:  # NaN, Infinity, a number of thousands of digits
        raise RowError("not valid JSON: a number out of range") from error
    # JSON can escape half of a surrogate pair; UTF-8 cannot encode it.
    for name in FIELDS:
        field = value.get(name) if type(value) is dict else None
        if type(field) is str and _LONE_SURROGATE.search(field):
            raise RowError(f"field '{name}' contains a lone surrogate, which is not a character")
    return value


def _fields(value: Any) -> dict[str, str]:
    if type(value) is not dict:
        raise RowError("not a JSON object")
    if "text" not in value:
        raise RowError("no field 'text'")
    fields = {"text": value["text"]}
    for name in OPTIONAL_FIELDS:
        field = value.get(name)
        if field is not None:
            fields[name] = field
    for name, field in fields.items():
        if type(field) is not str:
            raise RowError(f"field '{name}' is not a string")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


class TextParser:
    """Parses documents separated by form feeds. Skips blank ones between two separators.

    The text of a document is everything between the separators, except a byte order mark at the beginning of
    the body.
    """

    def __init__(self, spool: DocumentSpool, errors: RowErrors, limits: Limits) -> None:
        self._spool = spool
        self._errors = errors
        # Room for a byte order mark, so that dropping it does not make a too long document look short enough.
        self._unfinished = LineBuffer(limits.max_document_bytes + len(BYTE_ORDER_MARK))
        self._is_first = True
        self._line = 1
        self._first_line = 1  # of the current document

    def feed(self, piece: bytes) -> None:
        first, *others = piece.split(b"\f")
        self._add(first)
        for part in others:
            self.end()
            self._add(part)

    def end(self) -> None:
        raw = self._unfinished.take()
        if self._is_first:
            raw, self._is_first = raw.removeprefix(BYTE_ORDER_MARK), False
        self._parse(raw)
        self._first_line = self._line

    def close(self) -> None:
        return

    def _add(self, part: bytes) -> None:
        self._unfinished.add(part)
        self._line += part.count(b"\n")

    def _parse(self, raw: bytes) -> None:
        error_at = 0
        try:
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                error_at = error.start
                raise RowError("not valid UTF-8") from error
            if text and not text.isspace():
                error_at = max(0, raw.find(b"\0"))
                self._spool.add({"text": text})
        except RowError as error:
            line = self._first_line + raw.count(b"\n", 0, error_at)
            self._errors.add(f"line {line}", str(error))
