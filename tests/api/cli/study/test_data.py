"""Data of a study: the order of files, and text cut into pieces by date."""

import itertools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from api.cli.errors import CliError
from api.cli.study.data import DataFile, StudyData, load_data, parse_shares
from service.ingest.formats import ContentEncoding, DataFormat
from tests.support.study import write_documents

Document = dict[str, Any]


def write(folder: Path, *names: str) -> None:
    """Write files that contain their own names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(name)


# --- one file per version ---


def test_files_are_versions_in_the_order_of_the_numbers_in_their_names(tmp_path: Path) -> None:
    write(tmp_path / "train", "v10.ndjson", "v2.jsonl", "v1.txt", ".v0.txt")
    (tmp_path / "train" / "v3").mkdir()
    write(tmp_path / "validation", "held-11.ndjson", "held-9.ndjson", "held-10.ndjson.zst")
    data = load_data(tmp_path)
    assert data.labels == ("v1", "v2", "v10")
    assert [body.content.decode() for body in data.versions] == ["v1.txt", "v2.jsonl", "v10.ndjson"]
    assert [body.format for body in data.versions] == [DataFormat.TEXT, *[DataFormat.NDJSON] * 2]
    assert [(body.label, body.encoding) for body in data.slices] == [
        ("held-9", None),
        ("held-10", ContentEncoding.ZSTD),
        ("held-11", None),
    ]


def test_without_validation_there_are_no_slices_and_without_train_no_study(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="train has no files"):
        load_data(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(CliError, match="train has no files"):
        load_data(tmp_path)
    write(tmp_path / "train", "v1.txt")
    assert load_data(tmp_path).slices == ()


def test_either_every_version_has_a_slice_or_none(tmp_path: Path) -> None:
    write(tmp_path / "train", "v1.txt", "v2.txt", "v3.txt")
    write(tmp_path / "validation", "v1.txt", "v2.txt")
    with pytest.raises(CliError, match="validation has fewer files than train"):
        load_data(tmp_path)
    write(tmp_path / "validation", "v3.txt", "v4.txt")
    assert len(load_data(tmp_path).slices) == 3


def test_only_the_requested_number_of_versions_is_loaded(tmp_path: Path) -> None:
    for folder in ("train", "validation"):
        write(tmp_path / folder, "v1.txt", "v2.txt", "v3.txt")
    data = load_data(tmp_path, versions=2)
    assert data.labels == tuple(body.label for body in data.slices) == ("v1", "v2")
    for count in (0, 4, -1):
        with pytest.raises(CliError, match=f"has 3 data versions, not {count}"):
            load_data(tmp_path, versions=count)


@pytest.mark.parametrize("name", ["v1.csv", "v1", "v1.zst"])
def test_a_file_of_unknown_format_is_reported(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train", name)
    with pytest.raises(CliError, match=rf"cannot tell the format of .*train/{name} from its suffix"):
        load_data(tmp_path)


def test_versions_must_have_distinct_labels(tmp_path: Path) -> None:
    """Results are stored by label, so that equal labels would collide."""
    write(tmp_path / "train", "2024.01.ndjson", "2024.02.ndjson.gz", "2024.3.txt")
    assert load_data(tmp_path).labels == ("2024.01", "2024.02", "2024.3")
    write(tmp_path / "train", "2024.3.ndjson")
    with pytest.raises(CliError, match="have the same label") as caught:
        load_data(tmp_path)
    assert "2024.3, 2024.3" in caught.value.detail


def test_the_digest_covers_every_text_and_its_position(tmp_path: Path) -> None:
    bodies = [DataFile(f"v{n}", text.encode(), DataFormat.TEXT) for n, text in enumerate("abc")]
    first = StudyData((bodies[0], bodies[1]), (bodies[2],))
    others = [
        StudyData((bodies[1], bodies[0]), (bodies[2],)),
        StudyData((bodies[0], bodies[1]), (bodies[0],)),
        StudyData((bodies[0], bodies[1]), ()),
    ]
    assert len({data.digest for data in (first, *others)}) == 4
    assert StudyData(first.versions, first.slices).digest == first.digest


# --- cut by date ---


@pytest.mark.parametrize(
    ("text", "shares"), [("3", (1, 1, 1)), ("1", (1,)), ("10:10:10:3", (10, 10, 10, 3)), ("2:1", (2, 1))]
)
def test_a_cut_is_a_number_of_pieces_or_their_shares(text: str, shares: tuple[int, ...]) -> None:
    assert parse_shares(text) == shares


@pytest.mark.parametrize("text", ["0", "", "1:0", "1:", ":1", "1.5", "-2", "a", "1:2\n"])
def test_other_cuts_are_refused(text: str) -> None:
    with pytest.raises(CliError, match="expected a number of pieces, or shares"):
        parse_shares(text)


def documents_of(sizes: Sequence[int], dates: Sequence[str]) -> list[Document]:
    pairs = zip(sizes, dates, strict=True)
    return [{"id": n, "text": "ü" * size, "date": date} for n, (size, date) in enumerate(pairs)]


def day(number: int) -> str:
    return f"2024-{number // 28 + 1:02d}-{number % 28 + 1:02d}"


def read(body: DataFile) -> list[Document]:
    assert (body.format, body.encoding) == (DataFormat.NDJSON, None)
    return [json.loads(line) for line in body.content.decode().split("\n")[:-1]]


def cut(
    shares: Sequence[int], train: Sequence[Sequence[Document]], validation: Sequence[Document] = ()
) -> StudyData:
    """Load data from files with these documents, cut into shares."""
    with tempfile.TemporaryDirectory() as folder:
        for number, documents in enumerate(train):
            write_documents(Path(folder, "train", f"f{number}.ndjson"), documents)
            if validation:
                kept = validation[number :: len(train)]
                write_documents(Path(folder, "validation", f"f{number}.ndjson"), kept)
        return load_data(Path(folder), cut=shares)


def test_pieces_have_the_requested_shares() -> None:
    documents = documents_of([50] * 330, [day(n) for n in range(330)])
    data = cut((10, 10, 10, 3), [documents[200:], documents[:200]])
    assert data.labels == ("v1", "v2", "v3", "v4")
    assert [len(read(body)) for body in data.versions] == [100, 100, 100, 30]
    assert data.slices == ()


@given(
    shares=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 12), min_size=30, max_size=60),
    shuffled=st.randoms(use_true_random=False),
    files=st.integers(1, 3),
)
def test_every_document_is_in_one_piece_and_pieces_are_in_the_order_of_dates(
    shares: list[int], sizes: list[int], shuffled: Any, files: int
) -> None:
    wanted = [2 * sum(sizes) * share / sum(shares) for share in shares]
    longest = 2 * max(sizes)
    assume(longest <= min(wanted))
    dates = [day(n) for n in range(len(sizes))]
    documents = documents_of(sizes, dates)
    held_out = [{"id": -n, "text": "x", "date": date} for n, date in enumerate(["2023-12-31", *dates], 1)]
    for part in (documents, held_out):
        shuffled.shuffle(part)
    data = cut(shares, [documents[n::files] for n in range(files)], held_out)

    pieces = [read(body) for body in data.versions]
    assert list(itertools.chain(*pieces)) == sorted(documents, key=lambda document: document["date"])
    for piece, bytes_wanted in zip(pieces, wanted, strict=True):
        assert abs(sum(len(document["text"].encode()) for document in piece) - bytes_wanted) <= longest

    slices = [read(body) for body in data.slices]
    found = [document["id"] for piece in slices for document in piece]
    assert sorted(found) == sorted(document["id"] for document in held_out)
    starts = ["", *(piece[0]["date"] for piece in pieces[1:]), "9999"]
    for piece, start, end in zip(slices, starts[:-1], starts[1:], strict=True):
        assert piece
        assert all(start <= document["date"] < end for document in piece)


@given(
    shares=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    documents=st.lists(st.tuples(st.integers(1, 200), st.integers(0, 4)), min_size=1, max_size=12),
)
def test_no_document_is_split_even_if_the_cut_is_refused(
    shares: list[int], documents: list[tuple[int, int]]
) -> None:
    train = documents_of([size for size, _ in documents], [day(date) for _, date in documents])
    try:
        data = cut(shares, [train])
    except CliError:
        # One piece, or equally long documents in equal shares, can always be cut.
        assert len(shares) > 1
        assert len(train) < len(shares) or len(set(shares)) > 1 or len({size for size, _ in documents}) > 1
        return
    pieces = [read(body) for body in data.versions]
    assert len(pieces) == len(shares)
    assert all(pieces)
    # Documents of the same date keep the order of the files.
    assert list(itertools.chain(*pieces)) == sorted(train, key=lambda document: document["date"])


@pytest.mark.parametrize("date", [None, 2024])
def test_a_document_without_a_date_is_reported(date: int | None) -> None:
    documents = [{"id": "first", "text": "a", "date": day(1)}, {"id": "second", "text": "b", "date": date}]
    with pytest.raises(CliError, match="the document 'second' has no date"):
        cut((1, 1), [documents])
    del documents[1]["id"]
    with pytest.raises(CliError, match="the document 'b' has no date"):
        cut((1,), [documents[:1]], documents[1:])


def test_a_line_without_text_or_with_invalid_json_is_reported_by_number(tmp_path: Path) -> None:
    for line in ('{"date": "2024-01-01"}', '{"text": 1, "date": "2024-01-01"}', "[]", "{"):
        write(tmp_path / "train")
        (tmp_path / "train" / "v1.ndjson").write_text("\n" + line + "\n")
        with pytest.raises(CliError, match=r"train/v1\.ndjson, line 2 is no"):
            load_data(tmp_path, cut=(1,))


def test_a_cut_that_leaves_a_piece_without_documents_is_refused() -> None:
    documents = documents_of([10, 10, 10], [day(1), day(2), day(3)])
    with pytest.raises(CliError, match="3 documents cannot be cut into 4 pieces"):
        cut((1,) * 4, [documents])
    long = documents_of([10, 10, 1000], [day(1), day(2), day(3)])
    with pytest.raises(CliError, match="a document is longer than a piece"):
        cut((1, 1, 1), [long])
    with pytest.raises(CliError, match="a piece has no validation documents for its dates"):
        cut((1, 1, 1), [documents], documents[:2])


@pytest.mark.parametrize("name", ["v1.txt", "v1.ndjson.gz"])
def test_only_plain_ndjson_is_cut(tmp_path: Path, name: str) -> None:
    write(tmp_path / "train", name)
    with pytest.raises(CliError, match=f"--cut cannot read .*{name}"):
        load_data(tmp_path, cut=(1,))
