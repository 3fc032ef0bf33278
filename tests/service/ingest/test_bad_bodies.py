"""Bad bodies: every error is reported with its line, and nothing is stored."""

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest
import zstandard
from pydantic_core import from_json

from service.artifacts import LocalArtifacts
from service.core.errors import BadContent
from service.ingest.formats import ContentEncoding, DataFormat, Limits
from service.ingest.ingest import Ingest
from tests.service.ingest.support import ENCODERS, GZIP, NDJSON, PARQUET, TEXT, ZSTD, ndjson, row_errors

GOOD = b'{"text": "good"}'

BAD_LINES = {
    "malformed": (b'{"text": "a"', "not valid JSON: Expecting ',' delimiter at column 13"),
    "no value": (b'{"text": }', "not valid JSON: Expecting value at column 10"),
    "two values": (b'{"text": "a"} {"text": "b"}', "not valid JSON: Extra data at column 15"),
    "raw control character": (
        b'{"text": "a\tb"}',
        "not valid JSON: Invalid control character at at column 12",
    ),
    "nan": (b'{"text": "a", "x": NaN}', "not valid JSON: a number out of range"),
    "huge integer": (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "not valid JSON: a number out of range"),
    "deep": (b'{"text": "a", "x": ' + b"[" * 100_000, "not valid JSON: nested too deeply"),
    "deep and whole": (b"[" * 50_000 + b"]" * 50_000, "not valid JSON: nested too deeply"),
    "list": (b'["text"]', "not a JSON object"),
    "string": (b'"text"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "no text": (b'{"id": "1"}', "no field 'text'"),
    "text is null": (b'{"text": null}', "field 'text' is not a string"),
    "text is a number": (b'{"text": 5}', "field 'text' is not a string"),
    "id is a number": (b'{"text": "a", "id": 5}', "field 'id' is not a string"),
    "date is a list": (b'{"text": "a", "date": []}', "field 'date' is not a string"),
    "source is false": (b'{"text": "a", "source": false}', "field 'source' is not a string"),
    "empty": (b'{"text": ""}', "the text is empty"),
    "blank": (b'{"text": " \\n\\t"}', "the text is empty"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}', "not valid UTF-8 at byte 14 of the line"),
    "surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "not valid UTF-8 at byte 11 of the line"),
    "NUL": (b'{"text": "a\\u0000b"}', "the text contains a NUL character"),
    "NUL in id": (b'{"text": "a", "id": "\\u0000"}', "field 'id' contains a NUL character"),
    "lone surrogate": (
        b'{"text": "a \\ud800 b"}',
        "field 'text' contains a lone surrogate, which is not a character",
    ),
    "lone surrogate in source": (
        b'{"text": "a", "source": "\\udfff"}',
        "field 'source' contains a lone surrogate, which is not a character",
    ),
    "too long a line": (b'{"text": "' + b"x" * 300_000 + b'"}', "the line is longer than 200000 bytes"),
    "too long a document": (b'{"text": "' + b"x" * 1500 + b'"}', "the text is longer than 1000 bytes"),
}
SMALL = Limits(max_line_bytes=200_000, max_document_bytes=1000)


@pytest.mark.parametrize("chunk_bytes", [997, 1 << 20])
@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_reported(tmp_path: Path, line: bytes, message: str, chunk_bytes: int) -> None:
    body = b"\n".join([GOOD, b"", line, GOOD])
    assert row_errors(tmp_path, body, limits=SMALL, chunk_bytes=chunk_bytes) == [("line 3", message)]


def test_an_error_in_a_last_line_without_a_line_end_is_found(tmp_path: Path) -> None:
    assert row_errors(tmp_path, GOOD + b"\n{") == [
        ("line 2", "not valid JSON: Expecting property name enclosed in double quotes at column 2")
    ]


def test_the_first_20_errors_are_reported_and_the_rest_is_not_read(tmp_path: Path) -> None:
    body = b"\n".join([GOOD, *[b"{}"] * 30])
    found = row_errors(tmp_path, body, chunk_bytes=7)
    assert found == [(f"line {number}", "no field 'text'") for number in range(2, 22)]


def test_the_message_counts_the_errors(tmp_path: Path) -> None:
    with Ingest(LocalArtifacts(tmp_path), NDJSON) as ingest:
        ingest.feed(b"{}\n[]\n")
        with pytest.raises(BadContent, match=r"^the body has 2 errors; nothing was stored$"):
            ingest.end()


@pytest.mark.parametrize("body", [b"", b"\n \r\n\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("encoding", [None, GZIP, ZSTD])
@pytest.mark.parametrize("format", [NDJSON, TEXT])
def test_a_body_without_documents(
    tmp_path: Path, format: DataFormat, encoding: ContentEncoding | None, body: bytes
) -> None:
    message = "the body has no documents" if body else "the body is empty"
    found = row_errors(tmp_path, ENCODERS[encoding](body), format, encoding)
    assert found == [("body", message)]


@pytest.mark.parametrize("format", [NDJSON, TEXT, PARQUET])
@pytest.mark.parametrize("encoding", [GZIP, ZSTD])
def test_an_encoded_body_of_no_bytes_at_all(
    tmp_path: Path, format: DataFormat, encoding: ContentEncoding
) -> None:
    assert row_errors(tmp_path, b"", format, encoding) == [("body", "the body is empty")]


def test_errors_in_text_are_reported_by_line(tmp_path: Path) -> None:
    body = b"fine\n\fone\ntwo \xff\n\fthree\n\0\f" + b"x\n" * 600 + b"\fcaf\xc3"
    assert row_errors(tmp_path, body, TEXT, limits=SMALL, chunk_bytes=11) == [
        ("line 3", "not valid UTF-8"),
        ("line 5", "the text contains a NUL character"),
        ("line 5", "the text is longer than 1000 bytes"),
        ("line 605", "not valid UTF-8"),
    ]


def test_a_text_may_be_as_long_as_the_document_limit(tmp_path: Path) -> None:
    assert row_errors(tmp_path, b"\xef\xbb\xbf" + b"x" * 1000, TEXT, limits=SMALL) == []
    for body in (b"x" * 1001, b"\xef\xbb\xbf" + b"x" * 1001):
        assert row_errors(tmp_path, body, TEXT, limits=SMALL) == [
            ("line 1", "the text is longer than 1000 bytes")
        ]


@pytest.mark.parametrize("encoding", [GZIP, ZSTD])
@pytest.mark.parametrize("cut", [1, 5, 9, 100])
def test_a_stream_that_is_cut_short_is_bad(tmp_path: Path, encoding: ContentEncoding, cut: int) -> None:
    body = ENCODERS[encoding](ndjson(*(str(number) for number in range(500))))
    assert row_errors(tmp_path, body[:-cut], NDJSON, encoding) == [
        ("body", f"the {encoding} stream is cut short")
    ]
    assert row_errors(tmp_path, body[:cut], NDJSON, encoding) == [
        ("body", f"the {encoding} stream is cut short")
    ]


@pytest.mark.parametrize("encoding", [GZIP, ZSTD])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 16])
def test_bytes_after_a_stream_are_bad(tmp_path: Path, encoding: ContentEncoding, chunk_bytes: int) -> None:
    body = ENCODERS[encoding](ndjson("a")) + b"garbage"
    message = f"bytes that are not {encoding} follow the {encoding} stream"
    assert row_errors(tmp_path, body, NDJSON, encoding, chunk_bytes=chunk_bytes) == [("body", message)]


@pytest.mark.parametrize("encoding", [GZIP, ZSTD])
def test_a_body_that_is_not_the_announced_stream_is_bad(tmp_path: Path, encoding: ContentEncoding) -> None:
    message = f"the body is not a valid {encoding} stream"
    assert row_errors(tmp_path, ndjson("a", "b"), NDJSON, encoding) == [("body", message)]
    damaged = bytearray(ENCODERS[encoding](ndjson(*(str(number) for number in range(500)))))
    damaged[-6:] = b"\xff" * 6
    assert row_errors(tmp_path, bytes(damaged), NDJSON, encoding) == [("body", message)]


def test_a_zstd_window_over_8_mib_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=24)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    body = stream.compress(ndjson("a")) + stream.flush()
    message = "the zstd stream needs a window larger than 8388608 bytes"
    assert row_errors(tmp_path, body, NDJSON, ZSTD) == [("body", message)]


@pytest.mark.parametrize("encoding", [None, GZIP, ZSTD])
def test_a_body_that_decodes_to_too_many_bytes_is_bad(
    tmp_path: Path, encoding: ContentEncoding | None
) -> None:
    body = ENCODERS[encoding](ndjson("a") * 1000)
    limits = Limits(max_decoded_bytes=10_000)
    message = "the body decodes to more than 10000 bytes"
    assert row_errors(tmp_path, body, NDJSON, encoding, limits) == [("body", message)]


@pytest.mark.parametrize("encoding", [GZIP, ZSTD])
def test_a_bomb_is_refused_in_flat_memory(tmp_path: Path, encoding: ContentEncoding) -> None:
    """32 MiB of blank lines in at most 32 KiB, fed as one chunk."""
    bomb = ENCODERS[encoding]((b" " * 4095 + b"\n") * (32 << 8))
    limits = Limits(expansion_floor_bytes=16 << 20, max_expansion=100)
    tracemalloc.start()
    try:
        found = row_errors(tmp_path, bomb, NDJSON, encoding, limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [("body", "the body decodes to more than 100 times its size")]
    assert peak < 48 << 20


def test_json_that_would_expand_in_memory_is_not_parsed(tmp_path: Path) -> None:
    bomb = json.dumps({"text": "a", "x": [[]] * 1_000_000}, separators=(",", ":")).encode()
    message = "the line has more than 1048576 bytes of JSON outside strings"
    assert row_errors(tmp_path, bomb) == [("line 1", message)]
    strings = json.dumps({"text": '"[,' * 600_000, "x": ["[", "\\"] * 10}).encode()
    assert len(strings) > 1 << 20
    assert row_errors(tmp_path, strings) == []


def test_the_last_of_several_gzip_members_must_be_complete(tmp_path: Path) -> None:
    body = gzip.compress(ndjson("a")) + gzip.compress(ndjson("b"))[:-1]
    assert row_errors(tmp_path, body, NDJSON, GZIP) == [("body", "the gzip stream is cut short")]


def test_the_fast_json_parser_accepts_nothing_that_the_json_module_refuses() -> None:
    """Damages good lines at random. If both parsers accept one, they return the same value."""
    draw = random.Random(5)
    good = rb'{"text": "\u00e9 \ud83d\ude00", "id": "x", "n": [1, -2.5e3, null, true, {"k": 0}]}'
    tokens = [bytes([byte]) for byte in b"\"\\{}[],:01-+.eE \t\rund\x00\xff\xc3/'"] + [b"NaN", b"-Infinity"]
    accepted = 0
    for _ in range(20_000):
        line = bytearray(good)
        for _ in range(draw.randint(1, 2)):
            at = draw.randrange(len(line))
            line[at : at + draw.randint(0, 2)] = draw.choice([b"", *tokens])
        try:
            value = from_json(bytes(line), allow_inf_nan=False, cache_strings="none")
        except ValueError:
            continue
        accepted += 1
        assert value == json.loads(line.decode())
    assert accepted > 1000
