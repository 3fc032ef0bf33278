"""Registering at the same time, in one process and in two: what is written in one round, and what is divided again."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from service.artifacts import Artifacts
from service.ingest.division import holdout_size
from service.ingest.documents import document_hash
from service.ingest.formats import DataFormat
from service.ingest.hash_memory import SMALL_DOCUMENTS
from service.ingest.ingest import Ingest, Ingested
from service.ingest.reading import read_documents, training_documents
from service.operations.exclusion import exclude_version
from service.register_data import create_dataset, register_slice
from service.register_versions import VersionRegistrar
from service.store.database import Database
from service.store.tables import DataVersion, Event
from tests.support.control_plane import ndjson

HOLDOUT_FRACTION = 0.25
MANY = tuple(f"many {number}" for number in range(SMALL_DOCUMENTS + 1))
SECONDS = 60


@dataclass(frozen=True)
class Made:
    """What became of a body. ``published``: the keys that it was published under, one a division."""

    texts: tuple[str, ...]
    row: DataVersion
    created: bool
    published: list[str]


class Watched(Ingest):
    """Notes what it publishes. During its first publication something happens: its division is done, its round is not."""

    def __init__(self, artifacts: Artifacts, meanwhile: Callable[[], object] | None) -> None:
        super().__init__(artifacts, DataFormat.NDJSON)
        self.published: list[str] = []
        self._meanwhile = meanwhile

    def publish_version(self, *earlier: Any, **known: Any) -> Ingested:
        ingested = super().publish_version(*earlier, **known)
        self.published.append(ingested.manifest.key)
        if self._meanwhile is not None and len(self.published) == 1:
            self._meanwhile()
        return ingested


class Gathering:
    """A lock that nobody gets before so many have come for it."""

    def __init__(self, count: int) -> None:
        self._missing = count
        self._counting, self._lock = threading.Lock(), threading.Lock()
        self._all_came = threading.Event()

    def __enter__(self) -> None:
        with self._counting:
            self._missing -= 1
            if self._missing <= 0:
                self._all_came.set()
        assert self._all_came.wait(SECONDS)
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


class Process:
    """What a process has of its own."""

    def __init__(self, url: str, root: Path) -> None:
        self.database = Database(url)
        self.artifacts = Artifacts(root)
        self.registrar = VersionRegistrar(self.database, self.artifacts)

    def register(
        self, *texts: str, dataset: str = "d", meanwhile: Callable[[], object] | None = None
    ) -> Made:
        with Watched(self.artifacts, meanwhile) as ingest:
            ingest.feed(ndjson(*texts))
            registered = self.registrar.register(dataset, ingest, ingest.end())
            return Made(texts, registered.row, registered.created, ingest.published)

    def in_one_round(self, *bodies: Sequence[str], datasets: Sequence[str] = ()) -> list[Made]:
        """Register all of them at once, each divided by what was there before; in order of number."""
        rounds: Any = self.registrar._rounds._rounds
        rounds._turn = Gathering(len(bodies))
        names = datasets or ["d"] * len(bodies)
        with ThreadPoolExecutor(len(bodies)) as pool:
            futures = [
                pool.submit(self.register, *texts, dataset=name)
                for texts, name in zip(bodies, names, strict=True)
            ]
        return sorted((future.result() for future in futures), key=lambda made: made.row.number)

    def give(self, *texts: str) -> None:
        with Ingest(self.artifacts, DataFormat.NDJSON) as ingest:
            ingest.feed(ndjson(*texts))
            ingest.end()
            register_slice(self.database, "d", ingest, name="suite")

    def exclude(self, number: int) -> None:
        exclude_version(self.database, "d", number, "a mirror")

    def held_out(self, made: Made) -> set[str]:
        folder = self.artifacts.open(made.row.artifact_key)
        return {document.text for document in read_documents(folder, "holdout.ndjson.zst")}

    def count(self, query: Any) -> int:
        with self.database.reading() as session:
            return session.scalar(sa.select(sa.func.count()).select_from(query)) or 0


Processes = tuple[Process, Process]


@pytest.fixture
def processes(database: Database, tmp_path: Path) -> Iterator[Processes]:
    """Two that share a database and artifacts, and a dataset in them."""
    create_dataset(database, "d", holdout_fraction=HOLDOUT_FRACTION)
    both = Process(database.url, tmp_path / "artifacts"), Process(database.url, tmp_path / "artifacts")
    yield both
    for each in both:
        each.database.close()


@pytest.fixture
def process(processes: Processes) -> Process:
    return processes[0]


def check(process: Process, made: Sequence[Made]) -> None:
    """These are all versions of the dataset, numbered without gaps, each divided by what those before it have."""
    made = sorted(made, key=lambda each: each.row.number)
    assert [each.row.number for each in made] == list(range(1, len(made) + 1))
    assert process.count(DataVersion) == len(made)
    created = sa.select(Event.id).where(Event.type == "data_version.created").subquery()
    assert process.count(created) == len(made)
    known: set[str] = set()
    folders: list[Path] = []
    for each in made:
        new = set(each.texts) - known
        folder, held_out = process.artifacts.open(each.row.artifact_key), process.held_out(each)
        assert each.row.duplicates == len(each.texts) - len(new)
        assert len(held_out) == each.row.holdout_documents == holdout_size(HOLDOUT_FRACTION, len(new))
        trained = [document.text for document in training_documents(folder, folders, [])]
        assert sorted([*held_out, *trained]) == sorted(new)
        known |= new
        folders.append(folder)


def test_two_processes_that_register_at_once_leave_no_gaps_and_count_every_duplicate(
    processes: Processes,
) -> None:
    start = threading.Barrier(8)

    def register(at: int) -> list[Made]:
        process = processes[at % 2]
        start.wait(SECONDS)
        return [
            # One that all have, one that a thread of the other process has, and one of its own, twice.
            process.register(
                "common", f"{at // 2} {step}", f"{at}.{step}", f"{at}.{step}", f"new {at}.{step}"
            )
            for step in range(3)
        ]

    with ThreadPoolExecutor(8) as pool:
        made = [each for of_thread in pool.map(register, range(8)) for each in of_thread]
    assert len(made) == 24
    assert all(each.created for each in made)
    check(processes[0], made)


def test_what_two_processes_register_at_once_with_equal_content_is_one_row(processes: Processes) -> None:
    start = threading.Barrier(6)

    def register(at: int) -> Made:
        start.wait(SECONDS)
        return processes[at % 2].register("a", "b")

    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(register, range(6)))
    assert len({each.row.id for each in made}) == 1
    assert sum(each.created for each in made) == 1
    check(processes[0], made[:1])


def test_those_of_one_round_that_have_nothing_in_common_are_published_once_and_committed_together(
    process: Process,
) -> None:
    commits: list[object] = []
    event.listen(process.database.engine, "commit", commits.append)
    made = process.in_one_round(["a", "b"], ["c", "d", "e"], ["f"])
    assert len(commits) == 1
    assert [len(each.published) for each in made] == [1, 1, 1]
    check(process, made)


def test_those_of_one_round_with_equal_content_are_one_row(process: Process) -> None:
    made = process.in_one_round(["a", "b"], ["a", "b"], ["a", "b"])
    assert len({each.row.id for each in made}) == 1
    assert sorted(each.created for each in made) == [False, False, True]
    check(process, made[:1])


def test_of_those_of_one_round_with_a_common_document_the_later_is_divided_again(process: Process) -> None:
    first, later = process.in_one_round(["a", "b", "c"], ["a", "d", "e"])
    assert (len(first.published), len(later.published)) == (1, 2)
    assert (first.row.duplicates, later.row.duplicates) == (0, 1)
    check(process, [first, later])


def test_a_round_goes_on_in_each_of_its_datasets(process: Process) -> None:
    create_dataset(process.database, "other", holdout_fraction=HOLDOUT_FRACTION)
    before = process.register("a", dataset="other")
    made = process.in_one_round(["a", "b"], ["a", "b"], ["a", "c"], datasets=["d", "other", "other"])
    assert all(each.created for each in made)
    of_other = [each.row for each in made if each.row.dataset_id == before.row.dataset_id]
    assert [(row.number, row.duplicates) for row in of_other] == [(2, 1), (3, 1)]
    assert [(each.row.number, each.row.duplicates) for each in made if each.row not in of_other] == [(1, 0)]


def test_what_another_process_added_before_is_seen_though_this_one_knows_how_the_dataset_stood(
    processes: Processes,
) -> None:
    process, other = processes
    made = [
        process.register("a", "b"),
        other.register("b", "c"),
        process.register("c", "d"),
        other.register("d", "e"),
    ]
    assert [each.row.duplicates for each in made] == [0, 1, 1, 1]
    check(process, made)


@pytest.mark.parametrize("texts", [("b", "a"), ("b", "a", "c", "e")])
def test_what_only_an_excluded_version_has_is_new_again_though_it_is_in_memory(
    process: Process, texts: tuple[str, ...]
) -> None:
    process.register("a", "b")
    process.register("c", "d")
    process.exclude(1)
    again = process.register(*texts)
    assert (again.created, again.row.number) == (True, 3)
    assert again.row.duplicates == len({"c"} & set(texts))
    later = process.register("a", "d", "x")
    assert (later.row.number, later.row.duplicates, len(later.published)) == (4, 2, 1)


def test_what_is_excluded_between_division_and_round_is_reckoned_with(process: Process) -> None:
    process.register("a", "b")
    made = process.register("a", "c", meanwhile=lambda: process.exclude(1))
    assert (made.row.number, made.row.duplicates, len(made.published)) == (2, 0, 2)


def test_after_a_slice_was_given_its_documents_are_not_held_out_and_a_body_is_published_once(
    process: Process,
) -> None:
    process.register("x")
    process.register("y")  # by now the process knows how the dataset stands
    texts = sorted("abcdefghijkl", key=lambda text: document_hash(text))
    given = set(texts[:4])  # the lowest hashes, which would be held out
    process.give(*given)
    first = process.register(*texts[0:3], *texts[4:8])
    assert len(process.held_out(first)) == first.row.holdout_documents == 1
    assert process.held_out(first).isdisjoint(given)
    for texts_of_later in ((texts[3], *texts[8:10]), (*texts[10:12], "z")):
        before = set(process.artifacts.keys("data"))
        later = process.register(*texts_of_later)
        assert later.published == [later.row.artifact_key]
        assert set(process.artifacts.keys("data")) - before == {later.row.artifact_key}
        assert later.row.holdout_documents == 1
        assert process.held_out(later).isdisjoint(given)


@pytest.mark.parametrize("ahead", [0, 1], ids=["the_same_process", "another_process"])
def test_a_large_body_is_published_once_where_a_small_one_without_its_documents_got_ahead(
    processes: Processes, ahead: int
) -> None:
    process = processes[0]
    made = [process.register("a")]
    large = process.register(*MANY, meanwhile=lambda: made.append(processes[ahead].register("b", "c")))
    assert (large.row.number, large.row.duplicates) == (3, 0)
    assert large.published == [large.row.artifact_key]
    check(process, [*made, large])


@pytest.mark.parametrize("ahead", [0, 1], ids=["the_same_process", "another_process"])
def test_a_large_body_is_divided_again_where_a_small_one_with_one_of_its_documents_got_ahead(
    processes: Processes, ahead: int
) -> None:
    process = processes[0]
    made = [process.register("a")]
    large = process.register(*MANY, meanwhile=lambda: made.append(processes[ahead].register("b", MANY[7])))
    assert (large.row.number, large.row.duplicates, len(large.published)) == (3, 1, 2)
    check(process, [*made, large])


def test_a_common_document_that_was_known_before_does_not_have_a_large_body_divided_again(
    process: Process,
) -> None:
    made = [process.register("a", MANY[7])]
    large = process.register(*MANY, meanwhile=lambda: made.append(process.register("b", MANY[7])))
    assert (large.row.number, large.row.duplicates, len(large.published)) == (3, 1, 1)
    check(process, [*made, large])


@pytest.mark.parametrize("common", [(), (MANY[7],)], ids=["nothing_in_common", "a_common_document"])
def test_a_small_body_is_divided_again_where_a_large_one_got_ahead(
    process: Process, common: tuple[str, ...]
) -> None:
    made: list[Made] = []
    small = process.register("a", "b", *common, meanwhile=lambda: made.append(process.register(*MANY)))
    assert (small.row.number, small.row.duplicates, len(small.published)) == (2, len(common), 2)
    check(process, [*made, small])
