"""Good bodies: equal documents give equal artifacts, whatever the format, encoding and chunk size."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from service.artifacts import Artifacts, LocalArtifacts
from service.core.artifact_files import DOCUMENTS, HASHES, HOLDOUT, HOLDOUT_HASHES
from service.ingest.documents import Document
from service.ingest.formats import ContentEncoding
from service.ingest.ingest import Ingest
from service.ingest.line_file import read_lines
from service.ingest.reading import read_documents
from tests.service.ingest.support import (
    ENCODERS,
    GZIP,
    NDJSON,
    PARQUET,
    TEXT,
    ZSTD,
    as_row,
    folder,
    in_chunks,
    ndjson,
    parquet,
    publish,
)

# Every character but NUL, surrogates and the form feed; not only white space.
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\f"), min_size=1, max_size=40
).filter(lambda text: not text.isspace() and not text.startswith("\ufeff"))
OPTIONAL = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
DOCUMENTS_WITH_FIELDS = st.builds(Document, text=TEXTS, id=OPTIONAL, date=OPTIONAL, source=OPTIONAL)


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return LocalArtifacts(tmp_path)


@settings(max_examples=60)
@given(st.lists(DOCUMENTS_WITH_FIELDS, min_size=1, max_size=12), st.booleans())
def test_documents_are_read_back_as_sent(
    tmp_path_factory: pytest.TempPathFactory, documents: list[Document], ascii_only: bool
) -> None:
    artifacts = LocalArtifacts(tmp_path_factory.mktemp("a"))
    lines = [json.dumps(as_row(document), ensure_ascii=ascii_only) for document in documents]
    version = publish(artifacts, "\n".join(lines).encode())
    assert list(read_documents(folder(artifacts, version))) == documents
    hashes = {hashlib.sha256(document.text.encode()).digest() for document in documents}
    assert (folder(artifacts, version) / HASHES).read_bytes() == b"".join(sorted(hashes))
    assert (version.documents, version.duplicates) == (len(documents), len(documents) - len(hashes))


@settings(max_examples=40)
@given(
    st.lists(TEXTS, min_size=2, max_size=20, unique=True),
    st.sampled_from([None, GZIP, ZSTD]),
    st.sampled_from([1, 2, 3, 7, 64, 1 << 20]),
)
def test_encoding_and_chunk_size_change_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    encoding: ContentEncoding | None,
    chunk_bytes: int,
) -> None:
    artifacts = LocalArtifacts(tmp_path_factory.mktemp("a"))
    body = ndjson(*texts)
    whole = publish(artifacts, body, fraction=0.2)
    chunks = in_chunks(ENCODERS[encoding](body), chunk_bytes)
    cut = publish(LocalArtifacts(tmp_path_factory.mktemp("b")), chunks, NDJSON, encoding, fraction=0.2)
    assert cut.manifest.sha256 == whole.manifest.sha256
    assert cut.manifest.key == whole.manifest.key
    assert (cut.sha256, cut.bytes) == (hashlib.sha256(body).hexdigest(), len(body))


def test_the_three_formats_give_the_same_files(tmp_path: Path) -> None:
    texts = ['Erster Absatz.\nZweite Zeile "zitiert" \\ \t', "żółć 🜁 \x01", " third\r\n"]
    bodies = {
        NDJSON: ndjson(*texts),
        TEXT: "\f".join(texts).encode(),
        PARQUET: parquet({"text": texts, "other": [1, 2, 3]}),
    }
    versions = {
        format: publish(LocalArtifacts(tmp_path / format), body, format, fraction=0.4)
        for format, body in bodies.items()
    }
    assert len({version.manifest.sha256 for version in versions.values()}) == 1
    assert len({version.manifest.key for version in versions.values()}) == 3
    for format, version in versions.items():
        assert version.sha256 == hashlib.sha256(bodies[format]).hexdigest()
        assert (version.documents, version.holdout_documents) == (3, 1)


def test_a_version_has_four_files_and_publishes_only_them(artifacts: Artifacts) -> None:
    version = publish(artifacts, ndjson("a", "b", "c"), fraction=0.02)
    assert {file.path for file in version.manifest.files} == {DOCUMENTS, HASHES, HOLDOUT, HOLDOUT_HASHES}
    assert version.manifest.key.startswith("data/")
    assert {path.relative_to(artifacts.root).parts[0] for path in artifacts.root.iterdir()} == {"data"}
    assert version.manifest.result == {
        "sha256": version.sha256,
        "bytes": version.bytes,
        "format": "ndjson",
        "documents": 3,
        "duplicates": 0,
        "holdout_documents": 1,
    }


def test_the_same_body_again_is_the_same_artifact(artifacts: Artifacts) -> None:
    first, second = (publish(artifacts, ndjson("a", "b"), fraction=0.1) for _ in range(2))
    assert first == second


def test_documents_are_normalized(artifacts: Artifacts) -> None:
    body = (
        b'\xef\xbb\xbf{"z": [1, {}], "source": "s", "text": "caf\\u00e9", "id": null}\r\n\n  \n{"text":"b"}'
    )
    version = publish(artifacts, body)
    lines = list(read_lines((folder(artifacts, version) / DOCUMENTS).open("rb")))
    assert lines == ['{"text":"café","source":"s"}\n'.encode(), b'{"text":"b"}\n']


def test_text_without_form_feeds_is_one_document(artifacts: Artifacts) -> None:
    version = publish(artifacts, b"\xef\xbb\xbfone\n\ntwo\n", TEXT)
    assert list(read_documents(folder(artifacts, version))) == [Document("one\n\ntwo\n")]


def test_blank_pieces_of_text_are_not_documents(artifacts: Artifacts) -> None:
    version = publish(artifacts, b"\fone\n\f\n\f two\f\f", TEXT)
    assert [document.text for document in read_documents(folder(artifacts, version))] == ["one\n", " two"]


@pytest.mark.parametrize("chunk_bytes", [1, 5, 1 << 16])
def test_gzip_of_several_members_and_zstd_of_several_frames(tmp_path: Path, chunk_bytes: int) -> None:
    parts = [ndjson("a", "b"), b"", ndjson("c")]
    plain = publish(LocalArtifacts(tmp_path / "plain"), b"".join(parts))
    for encoding, encode in ((GZIP, gzip.compress), (ZSTD, zstandard.compress)):
        body = b"".join(encode(part) for part in parts)
        version = publish(LocalArtifacts(tmp_path / encoding), in_chunks(body, chunk_bytes), NDJSON, encoding)
        assert version.manifest == plain.manifest.model_copy(update={"directory": version.manifest.directory})


def test_a_line_longer_than_a_piece_is_accepted(artifacts: Artifacts) -> None:
    text = "x" * (3 << 20)
    version = publish(artifacts, in_chunks(ndjson(text, "short"), 1 << 16))
    assert [len(document.text) for document in read_documents(folder(artifacts, version))] == [len(text), 5]


def test_zlib_output_that_fills_a_piece_exactly_is_not_held_back(artifacts: Artifacts) -> None:
    """zlib has consumed all input while it still holds more than a piece of output."""
    text = "a" * (2 << 20)
    version = publish(artifacts, gzip.compress(text.encode()), TEXT, GZIP)
    assert version.bytes == len(text)


def test_an_abandoned_body_leaves_nothing(artifacts: Artifacts) -> None:
    with Ingest(artifacts, NDJSON) as ingest:
        ingest.feed(ndjson("a"))
    assert list(artifacts.root.rglob("*")) == []
