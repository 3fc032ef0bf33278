"""Parquet bodies: read like other formats, in a process that protects against bombs and malformed files."""

import datetime
import io
import os
import resource
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service.artifacts import LocalArtifacts
from service.ingest import parquet as parquet_module
from service.ingest.documents import Document
from service.ingest.formats import Limits
from service.ingest.reading import read_documents
from tests.service.ingest.support import (
    ENCODERS,
    GZIP,
    PARQUET,
    folder,
    in_chunks,
    parquet,
    publish,
    row_errors,
)

MIB = 1 << 20

# Before its text, a page of one row has a definition level and the length of the text.
LEVELS_BYTES = 10


def varint(value: int, length: int = 0) -> bytes:
    """A thrift number, padded to ``length`` bytes."""
    value *= 2  # zigzag
    encoded: list[int] = []
    while value >= 0x80 or len(encoded) + 1 < length:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def lie(body: bytes, part: slice, true: int, false: int) -> bytes:
    """Replace a number everywhere in a part of a file, keeping its encoded length."""
    old = varint(true)
    new = varint(false, len(old))
    assert len(old) == len(new)
    assert old in body[part]
    lied = body[part].replace(old, new)
    return body[: part.start or 0] + lied + body[part.stop :] if part.stop else body[: part.start] + lied


def footer_of(body: bytes) -> slice:
    return slice(len(body) - 8 - int.from_bytes(body[-8:-4], "little"), None)


def dictionary_bomb(rows: int, **options: Any) -> bytes:
    """One text of a megabyte and many rows that refer to it: a run of equal indices takes a few bytes."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()).take(pa.array([0] * rows)), ["x" * MIB])
    return parquet({"text": texts}, compression="zstd", write_statistics=False, **options)


def test_rows_are_documents(tmp_path: Path) -> None:
    artifacts = LocalArtifacts(tmp_path)
    body = parquet(
        {
            "source": ["s", None, "t"],
            "text": ["one", "zwei ü", "three"],
            "ignored": [[1], [], None],
            "date": [datetime.date(2024, 12, 31), None, None],
            "id": pa.array([7, 8, None], pa.uint64()),
        },
        row_group_size=2,
    )
    version = publish(artifacts, in_chunks(ENCODERS[GZIP](body), 100), PARQUET, GZIP)
    assert list(read_documents(folder(artifacts, version))) == [
        Document("one", "7", "2024-12-31", "s"),
        Document("zwei ü", "8"),
        Document("three", source="t"),
    ]
    assert version.bytes == len(body)


@pytest.mark.parametrize(
    "texts",
    [
        pa.array(["a", "b", "a"], pa.large_string()),
        pa.array(["a", "b", "a"], pa.string_view()),
        pa.array(["a", "b", "a"]).dictionary_encode(),
    ],
    ids=["large", "view", "dictionary"],
)
def test_every_kind_of_string_is_text(tmp_path: Path, texts: pa.Array) -> None:
    artifacts = LocalArtifacts(tmp_path)
    version = publish(artifacts, parquet({"text": texts}), PARQUET)
    assert [document.text for document in read_documents(folder(artifacts, version))] == ["a", "b", "a"]


def test_bad_rows_are_reported(tmp_path: Path) -> None:
    texts = pa.array([b"good", None, b"", b"\xff", b"a\0b", b"x" * 1001, b"good"]).cast(
        pa.string(), safe=False
    )
    body = parquet({"text": texts, "id": [*["a"] * 6, "y" * 1001]})
    assert row_errors(tmp_path, body, PARQUET, limits=Limits(max_document_bytes=1000)) == [
        ("row 2", "column 'text' is null"),
        ("row 3", "the text is empty"),
        ("row 4", "column 'text' is not valid UTF-8"),
        ("row 5", "the text contains a NUL character"),
        ("row 6", "column 'text' is longer than 1000 bytes"),
        ("row 7", "column 'id' is longer than 1000 bytes"),
    ]


def test_reading_stops_at_the_20th_bad_row(tmp_path: Path) -> None:
    found = row_errors(tmp_path, parquet({"text": pa.array([None] * 100_000, pa.string())}), PARQUET)
    assert [item.location for item in found] == [f"row {number}" for number in range(1, 21)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"content": ["a"]}, "no column 'text'"),
        ({"text": [1]}, "column 'text' is of type int64, not string"),
        ({"text": [["a"]]}, "column 'text' is of type list<element: string>, not string"),
        ({"text": [b"a"]}, "column 'text' is of type binary, not string"),
        ({"text": ["a"], "id": [1.5]}, "column 'id' is of type double, not string"),
        ({"text": pa.array([], pa.string())}, "the body has no documents"),
    ],
    ids=["none", "number", "list", "binary", "float", "empty"],
)
def test_columns_that_are_not_text_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    assert row_errors(tmp_path, parquet(columns), PARQUET) == [("body", message)]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]), file)
    assert row_errors(tmp_path, file.getvalue(), PARQUET) == [
        ("body", "column 'text' appears more than once")
    ]


def test_the_error_for_a_file_that_is_not_parquet_names_no_path(tmp_path: Path) -> None:
    good = parquet({"text": ["a" * 5000, "b"]}, compression="none", use_dictionary=False)
    for body in (b"PAR1", b'{"text": "a"}\n', good[:-1], good[:100] + good[200:], b"\0" * 500):
        (found,) = row_errors(tmp_path, body, PARQUET)
        assert found.message.startswith("not a readable Parquet file: ")
        assert "/" not in found.message


def test_damaged_files_are_refused_or_read_but_never_crash_the_service(tmp_path: Path) -> None:
    good = parquet({"text": [f"document {number}" for number in range(300)]}, compression="snappy")
    for start in range(4, len(good), len(good) // 8):
        damaged = good[:start] + bytes(255 - byte for byte in good[start : start + 3]) + good[start + 3 :]
        row_errors(tmp_path, damaged, PARQUET)


@pytest.mark.parametrize("store_schema", [True, False], ids=["read as dictionary", "read as strings"])
def test_a_dictionary_bomb_is_refused_in_flat_memory(tmp_path: Path, store_schema: bool) -> None:
    """A terabyte of text in some kilobytes."""
    body = dictionary_bomb(1_000_000, store_schema=store_schema)
    assert len(body) < 8192
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limits = Limits(expansion_floor_bytes=16 * MIB)
    message = "the body decodes to more than 1000 times its size"
    assert row_errors(tmp_path, body, PARQUET, limits=limits) == [("body", message)]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024


def test_a_few_rows_of_a_megabyte_are_read(tmp_path: Path) -> None:
    artifacts = LocalArtifacts(tmp_path)
    version = publish(artifacts, dictionary_bomb(40), PARQUET)
    assert (version.documents, version.duplicates) == (40, 39)


def test_a_page_that_decodes_to_more_than_the_memory_limit_is_refused(tmp_path: Path) -> None:
    body = parquet(
        {"text": ["y" * (96 * MIB)]}, compression="zstd", use_dictionary=False, write_statistics=False
    )
    assert len(body) < 16384
    limits = Limits(parquet_memory_bytes=64 * MIB)
    (found,) = row_errors(tmp_path, body, PARQUET, limits=limits)
    assert found.message.startswith("the Parquet file needs more than 67108864 bytes of memory to read")


def test_false_sizes_do_not_evade_the_memory_limit(tmp_path: Path) -> None:
    """A large page that declares a small size, and a smaller one that declares a larger size."""
    size = 96 * MIB
    body = parquet({"text": ["y" * size]}, compression="zstd", use_dictionary=False, write_statistics=False)
    metadata = pq.read_metadata(io.BytesIO(body)).row_group(0).column(0)
    limits = Limits(parquet_memory_bytes=64 * MIB)
    footer = footer_of(body)
    for lied in (
        lie(body, footer, metadata.total_uncompressed_size, 1000),
        lie(body, slice(4, footer.start), size + LEVELS_BYTES, 1000),
    ):
        assert len(row_errors(tmp_path, lied, PARQUET, limits=limits)) == 1

    small = parquet(
        {"text": ["y" * 50_000_000]}, compression="zstd", use_dictionary=False, write_statistics=False
    )
    lied = lie(small, slice(4, footer_of(small).start), 50_000_000 + LEVELS_BYTES, 134_217_000)
    assert len(row_errors(tmp_path, lied, PARQUET, limits=limits)) == 1


@pytest.mark.parametrize("declared", [20, 40, 63])
def test_a_false_number_of_rows_is_refused_if_rows_are_missing(tmp_path: Path, declared: int) -> None:
    body = parquet({"text": [f"document {number}" for number in range(37)]}, use_dictionary=False)
    lied = lie(body, footer_of(body), 37, declared)
    found = row_errors(tmp_path, lied, PARQUET)
    # If it declares fewer rows, only those are read.
    assert bool(found) == (declared > 37)


def test_a_reader_that_dies_or_hangs_is_a_bad_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "child.py"
    monkeypatch.setattr(parquet_module, "_CHILD", script)
    script.write_text("import os; os.abort()")
    directory = tmp_path / "artifacts"
    directory.mkdir()
    (found,) = row_errors(directory, b"PAR1", PARQUET)
    assert found.message.startswith("the Parquet file could not be read: it is malformed")

    script.write_text(
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    monkeypatch.setattr(parquet_module, "STALL_SECONDS", 1)
    (found,) = row_errors(directory, b"PAR1", PARQUET)
    assert found.message == "the Parquet file could not be read: no row in 1 seconds"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_reader_imports_nothing_of_this_project() -> None:
    source = Path(parquet_module.__file__).with_name("parquet_child.py").read_text()
    assert "import service" not in source
    assert "from service" not in source
