"""Which documents of a body are duplicates, which are held out, and which are trained on."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.artifacts import Artifacts, LocalArtifacts
from service.core.artifact_files import HASHES, HOLDOUT, HOLDOUT_HASHES
from service.core.errors import NothingNew
from service.ingest.documents import document_hash
from service.ingest.ingest import Ingest, Ingested
from service.ingest.reading import read_documents, training_documents
from service.ingest.split import holdout_size
from tests.service.ingest.support import NDJSON, folder, ndjson, publish, publish_slice

NUMBERS = st.lists(st.integers(0, 30).map(str), max_size=30)


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return LocalArtifacts(tmp_path)


def texts(artifacts: Artifacts, version: Ingested, file: str) -> list[str]:
    return [document.text for document in read_documents(folder(artifacts, version), file)]


def trained(
    artifacts: Artifacts, version: Ingested, earlier: Sequence[Path], given: Sequence[Path]
) -> list[str]:
    documents = training_documents(folder(artifacts, version), earlier, given)
    return [document.text for document in documents]


@pytest.mark.parametrize(
    ("fraction", "documents", "size"),
    [
        (0, 1000, 0),
        (0.02, 1, 0),
        (0.02, 2, 1),
        (0.02, 10, 1),
        (0.02, 74, 1),
        (0.02, 76, 2),
        (0.02, 1000, 20),
        (0.5, 7, 3),
        (0.9, 10, 5),
        (1.0, 3, 1),
    ],
)
def test_holdout_sizes(fraction: float, documents: int, size: int) -> None:
    assert holdout_size(fraction, documents) == size


@settings(max_examples=50)
@given(NUMBERS, NUMBERS, NUMBERS, NUMBERS.filter(bool), st.sampled_from([0, 0.02, 0.2, 1]))
def test_a_body_is_split_as_defined(
    tmp_path_factory: pytest.TempPathFactory,
    first: list[str],
    second: list[str],
    suite: list[str],
    body: list[str],
    fraction: float,
) -> None:
    artifacts = LocalArtifacts(tmp_path_factory.mktemp("a"))
    earlier = [folder(artifacts, publish(artifacts, ndjson(*part))) for part in (first, second) if part]
    given_sets = [folder(artifacts, publish_slice(artifacts, ndjson(*suite)))] if suite else []

    known = {*first, *second}
    new = {text for text in body if text not in known and text not in suite}
    if not new:
        with pytest.raises(NothingNew):
            publish(artifacts, ndjson(*body), earlier=earlier, given=given_sets, fraction=fraction)
        return
    version = publish(artifacts, ndjson(*body), earlier=earlier, given=given_sets, fraction=fraction)
    held_out = set(sorted(new, key=document_hash)[: holdout_size(fraction, len(new))])
    in_order = list(dict.fromkeys(body))

    assert version.documents == len(body)
    assert version.duplicates == sum(text in known or text in body[:at] for at, text in enumerate(body))
    assert version.holdout_documents == len(held_out)
    assert texts(artifacts, version, HOLDOUT) == [text for text in in_order if text in held_out]
    hashes = sorted(document_hash(text) for text in held_out)
    assert (folder(artifacts, version) / HOLDOUT_HASHES).read_bytes() == b"".join(hashes)
    expected = [text for text in in_order if text in new - held_out]
    assert trained(artifacts, version, earlier, given_sets) == expected


def test_the_holdout_of_many_documents_is_the_lowest_hashes(artifacts: Artifacts) -> None:
    """Once with the holdout among the candidates, and once, with most documents known, beyond them."""
    numbers = [str(number) for number in range(4000)]
    version = publish(artifacts, ndjson(*numbers), fraction=0.02)
    lowest = set(sorted(numbers, key=document_hash)[:80])
    assert texts(artifacts, version, HOLDOUT) == [text for text in numbers if text in lowest]

    known = [text for text in numbers if document_hash(text) < b"\x20"]
    earlier = [folder(artifacts, publish(artifacts, ndjson(*known)))]
    version = publish(artifacts, ndjson(*numbers), earlier=earlier, fraction=0.02)
    new = sorted(set(numbers) - set(known), key=document_hash)
    lowest = set(new[: round(0.02 * len(new))])
    assert texts(artifacts, version, HOLDOUT) == [text for text in numbers if text in lowest]


def test_a_body_without_new_documents_leaves_nothing(artifacts: Artifacts) -> None:
    first = publish(artifacts, ndjson("a", "b"))
    folder(artifacts, first)
    before = set(artifacts.root.rglob("*"))
    with pytest.raises(NothingNew, match="already in"):
        publish(artifacts, ndjson("b", "a", "b"), earlier=[folder(artifacts, first)])
    suite = publish_slice(artifacts, ndjson("c"))
    with pytest.raises(NothingNew, match="uploaded evaluation set"):
        publish(
            artifacts,
            ndjson("a", "c"),
            earlier=[folder(artifacts, first)],
            given=[folder(artifacts, suite)],
        )
    assert {path for path in artifacts.root.rglob("*") if "slice" not in path.parts} == before


def test_documents_of_an_excluded_version_are_trained_on_again(artifacts: Artifacts) -> None:
    first = folder(artifacts, publish(artifacts, ndjson("a", "b")))
    version = publish(artifacts, ndjson("b", "c", "d", "e"), earlier=[first])
    assert version.duplicates == 1
    assert trained(artifacts, version, [first], []) == ["c", "d", "e"]
    assert trained(artifacts, version, [], []) == ["b", "c", "d", "e"]


def test_a_slice_given_later_keeps_its_documents_out_of_training(artifacts: Artifacts) -> None:
    version = publish(artifacts, ndjson("a", "b", "c"))
    suite = publish_slice(artifacts, ndjson("b", "x"))
    assert trained(artifacts, version, [], [folder(artifacts, suite)]) == ["a", "c"]


def test_a_body_can_be_published_again(artifacts: Artifacts) -> None:
    other = folder(artifacts, publish(artifacts, ndjson("a", "b")))
    with Ingest(artifacts, NDJSON) as ingest:
        ingest.feed(ndjson("a", "b", "c", "d"))
        ingest.end()
        first = ingest.publish_version([], [], 0.5)
        second = ingest.publish_version([other], [], 0.5)
    assert (first.duplicates, first.holdout_documents) == (0, 2)
    assert (second.duplicates, second.holdout_documents) == (2, 1)
    assert first.manifest.key != second.manifest.key
    for version in (
        first,
        second,
    ):  # opening verifies them: the second publication has not written into the first
        assert texts(artifacts, version, "documents.ndjson.zst") == ["a", "b", "c", "d"]


def test_a_slice_has_all_its_documents_and_no_holdout(artifacts: Artifacts) -> None:
    suite = publish_slice(artifacts, ndjson("b", "a", "b"))
    assert (suite.documents, suite.duplicates, suite.holdout_documents) == (3, 1, 0)
    assert suite.manifest.key.startswith("slice/")
    assert {file.path for file in suite.manifest.files} == {"documents.ndjson.zst", HASHES}
    assert texts(artifacts, suite, "documents.ndjson.zst") == ["b", "a", "b"]
    assert publish_slice(artifacts, ndjson("b", "a", "b")) == suite


def test_the_hash_of_a_document_covers_only_its_text() -> None:
    assert document_hash("żółć") == hashlib.sha256("żółć".encode()).digest()
