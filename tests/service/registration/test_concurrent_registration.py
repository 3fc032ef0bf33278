"""Registering at the same time, in one process and in two: numbers, duplicates and holdouts stay right."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.ingest.reading import training_documents
from service.ingest.split import holdout_size
from service.registration.hash_cache import MAX_CACHED_DOCUMENTS
from service.store.tables import DataVersion, Event
from tests.service.registration.harness import HOLDOUT_FRACTION, Process, Registered

LARGE = tuple(f"large {number}" for number in range(MAX_CACHED_DOCUMENTS + 1))
SECONDS = 60

Processes = tuple[Process, Process]


def check(process: Process, all_registered: Sequence[Registered]) -> None:
    """These are all versions of the dataset, without a gap, each split by the versions before it."""
    ordered = sorted(all_registered, key=lambda registered: registered.row.number)
    assert [registered.row.number for registered in ordered] == list(range(1, len(ordered) + 1))
    assert process.count(DataVersion) == len(ordered)
    created = sa.select(Event.id).where(Event.type == "data_version.created").subquery()
    assert process.count(created) == len(ordered)
    known: set[str] = set()
    folders: list[Path] = []
    for registered in ordered:
        row, texts = registered.row, registered.texts
        new = set(texts) - known
        folder, held_out = process.artifacts.open(row.artifact_key), process.held_out(row)
        assert row.duplicates == len(texts) - len(new)
        assert len(held_out) == row.holdout_documents == holdout_size(HOLDOUT_FRACTION, len(new))
        trained = [document.text for document in training_documents(folder, folders, [])]
        assert sorted([*held_out, *trained]) == sorted(new)
        known |= new
        folders.append(folder)


def test_two_processes_number_versions_without_gaps_and_count_every_duplicate(processes: Processes) -> None:
    start = threading.Barrier(8)

    def register(thread: int) -> list[Registered]:
        process = processes[thread % 2]
        start.wait(SECONDS)
        return [
            # One document that all bodies have, one that a thread of the other process has, and one twice.
            process.register(
                "common",
                f"{thread // 2} {step}",
                f"{thread}.{step}",
                f"{thread}.{step}",
                f"new {thread}.{step}",
            )
            for step in range(3)
        ]

    with ThreadPoolExecutor(8) as pool:
        all_registered = [registered for each in pool.map(register, range(8)) for registered in each]
    assert len(all_registered) == 24
    assert all(registered.created for registered in all_registered)
    check(processes[0], all_registered)


def test_equal_content_from_two_processes_is_one_row(processes: Processes) -> None:
    start = threading.Barrier(6)

    def register(thread: int) -> Registered:
        start.wait(SECONDS)
        return processes[thread % 2].register("a", "b")

    with ThreadPoolExecutor(6) as pool:
        all_registered = list(pool.map(register, range(6)))
    assert len({registered.row.id for registered in all_registered}) == 1
    assert sum(registered.created for registered in all_registered) == 1
    check(processes[0], all_registered[:1])


def test_versions_of_another_process_count_although_this_one_has_cached_the_dataset(
    processes: Processes,
) -> None:
    process, other = processes
    all_registered = [
        process.register("a", "b"),
        other.register("b", "c"),
        process.register("c", "d"),
        other.register("d", "e"),
    ]
    assert [registered.row.duplicates for registered in all_registered] == [0, 1, 1, 1]
    check(process, all_registered)


@pytest.mark.parametrize("ahead", [0, 1], ids=["the_same_process", "another_process"])
@pytest.mark.parametrize("texts", [("x", "y"), LARGE], ids=["small", "large"])
def test_a_body_is_published_once_if_a_small_version_without_its_documents_got_ahead(
    processes: Processes, texts: tuple[str, ...], ahead: int
) -> None:
    process = processes[0]
    before = [process.register("a")]
    registered = process.register(
        *texts, meanwhile=(lambda: before.append(processes[ahead].register("b", "c")),)
    )
    assert (registered.row.number, registered.row.duplicates) == (3, 0)
    assert registered.published == [registered.row.artifact_key]
    check(process, [*before, registered])


@pytest.mark.parametrize("ahead", [0, 1], ids=["the_same_process", "another_process"])
@pytest.mark.parametrize("texts", [("x", "y"), LARGE], ids=["small", "large"])
def test_a_body_is_split_again_if_a_small_version_with_one_of_its_documents_got_ahead(
    processes: Processes, texts: tuple[str, ...], ahead: int
) -> None:
    process = processes[0]
    before = [process.register("a")]
    registered = process.register(
        *texts, meanwhile=(lambda: before.append(processes[ahead].register("b", texts[-1])),)
    )
    row = registered.row
    assert (row.number, row.duplicates, len(registered.published)) == (3, 1, 2)
    check(process, [*before, registered])


@pytest.mark.parametrize("texts", [("x", "y"), LARGE], ids=["small", "large"])
def test_a_body_is_not_split_again_for_a_document_that_was_known_before(
    process: Process, texts: tuple[str, ...]
) -> None:
    before = [process.register("a", texts[-1])]
    registered = process.register(
        *texts, meanwhile=(lambda: before.append(process.register("b", texts[-1])),)
    )
    row = registered.row
    assert (row.number, row.duplicates, len(registered.published)) == (3, 1, 1)
    check(process, [*before, registered])


@pytest.mark.parametrize("common", [(), (LARGE[7],)], ids=["nothing_in_common", "a_common_document"])
def test_a_body_is_split_again_if_a_large_version_got_ahead(
    process: Process, common: tuple[str, ...]
) -> None:
    before: list[Registered] = []
    registered = process.register(
        "a", "b", *common, meanwhile=(lambda: before.append(process.register(*LARGE)),)
    )
    row = registered.row
    assert (row.number, row.duplicates, len(registered.published)) == (2, len(common), 2)
    check(process, [*before, registered])
