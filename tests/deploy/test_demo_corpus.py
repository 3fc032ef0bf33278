"""The demo's data: real text, reproducible, with no text in two versions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from api.cli.study.data import load_data
from deploy.demo.corpus import DemoVersion, demo_versions, to_ndjson, write
from service.ingest.formats import DataFormat


@pytest.fixture(scope="module")
def versions() -> list[DemoVersion]:
    return demo_versions()


def test_there_are_three_versions_of_the_intended_size(versions: list[DemoVersion]) -> None:
    assert [version.label for version in versions] == ["python", "numpy-sqlalchemy", "pytorch"]
    for version in versions:
        size = sum(len(document.text.encode()) for document in version.documents)
        assert 300_000 <= size <= 500_000, version.label
        assert len(version.documents) >= 200, version.label


def test_the_second_version_has_text_of_both_libraries(versions: list[DemoVersion]) -> None:
    libraries = [document.source.partition("/")[0] for document in versions[1].documents]
    assert set(libraries) == {"numpy", "sqlalchemy"}
    assert min(libraries.count("numpy"), libraries.count("sqlalchemy")) >= 50


def test_the_corpus_is_reproducible(versions: list[DemoVersion]) -> None:
    assert demo_versions() == versions


def test_no_document_occurs_twice_in_or_between_versions(versions: list[DemoVersion]) -> None:
    documents = [document for version in versions for document in version.documents]
    bodies = [document.text.partition("\n\n")[2] for document in documents]
    assert len(set(bodies)) == len(bodies)
    assert len({document.id for document in documents}) == len(documents)


def test_a_document_is_a_docstring_under_its_name(versions: list[DemoVersion]) -> None:
    for version in versions:
        for document in version.documents:
            heading, _, body = document.text.partition("\n\n")
            assert heading == document.id
            assert len(body) >= 200
            assert body == body.strip()
            assert not document.source.startswith("/")


def test_the_ndjson_is_valid_utf8_with_one_object_per_line(versions: list[DemoVersion]) -> None:
    for version in versions:
        lines = to_ndjson(version).decode("utf-8", errors="strict").split("\n")
        assert lines.pop() == ""
        rows = [json.loads(line) for line in lines]
        assert [row["text"] for row in rows] == [document.text for document in version.documents]
        assert all(set(row) == {"id", "text", "source"} for row in rows)


def test_a_study_can_read_the_written_corpus(versions: list[DemoVersion], tmp_path: Path) -> None:
    write(tmp_path / "data")
    data = load_data(tmp_path / "data")
    assert data.labels == ("v1", "v2", "v3")
    assert [body.content for body in data.versions] == [to_ndjson(version) for version in versions]
    assert {(body.format, body.encoding) for body in data.versions} == {(DataFormat.NDJSON, None)}
    assert data.slices == ()


def test_building_the_corpus_imports_no_library() -> None:
    code = "import sys; from deploy.demo.corpus import demo_versions; demo_versions(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "sqlalchemy"}.isdisjoint(done.stdout.split())
