"""Registering data versions: what is written together, and what happens if something comes in between."""

import pytest
import sqlalchemy as sa

from service.core.errors import NotFound, NothingNew
from service.ingest.documents import document_hash
from service.ingest.formats import DataFormat
from service.ingest.ingest import Ingest
from service.ingest.reading import training_documents
from service.registration.data_versions import register_version
from service.store import datasets
from service.store.tables import DataVersion, Event, Update
from tests.service.registration.harness import Process
from tests.support.control_plane import ndjson
from tests.support.rows import add_model


def test_a_version_its_updates_and_its_events_are_written_together(process: Process) -> None:
    with process.database.transaction() as session:
        dataset = datasets.dataset(session, "d")
        following = [add_model(session, dataset, name).id for name in ("a", "b")]
        manual = add_model(session, dataset, "c")
        manual.spec = {**manual.spec, "auto_update": False}
    registered = process.register(*"abcdefgh", label="first")
    assert registered.created
    row = registered.row
    assert (row.number, row.label, row.documents, row.holdout_documents) == (1, "first", 8, 2)
    with process.database.reading() as session:
        updates = session.scalars(sa.select(Update)).all()
        assert sorted(update.model_id for update in updates) == sorted(following)
        assert {(update.state, update.data_version_id) for update in updates} == {("pending", row.id)}
        assert sorted(update.id for update in updates) == sorted(registered.updates)
        types = session.scalars(sa.select(Event.type).order_by(Event.id)).all()
    assert types == ["dataset.created", "data_version.created", "update.created", "update.created"]


def test_the_same_content_is_the_same_row(process: Process) -> None:
    first = process.register("a", "b")
    again = process.register("a", "b")
    assert (again.row.id, again.created) == (first.row.id, False)
    assert process.count(DataVersion) == 1


def test_a_body_without_a_new_document_stores_nothing(process: Process) -> None:
    process.register("a", "b")
    with pytest.raises(NothingNew):
        process.register("b", "a")
    assert process.count(DataVersion) == 1
    assert len(process.artifacts.keys("data")) == 1


def test_an_unknown_dataset_is_not_found(process: Process) -> None:
    with Ingest(process.artifacts, DataFormat.NDJSON) as ingest:
        ingest.feed(ndjson("a"))
        with pytest.raises(NotFound):
            register_version(process.database, process.cache, "unknown", ingest, ingest.end())


def test_versions_are_numbered_and_duplicates_count_earlier_versions(process: Process) -> None:
    process.register("a", "b")
    process.register("b", "c", "d")
    row = process.register("a", "d", "e").row
    assert (row.number, row.duplicates) == (3, 2)


def test_a_body_is_split_again_if_a_version_with_its_documents_came_in_between(process: Process) -> None:
    registered = process.register("a", "b", "c", meanwhile=(lambda: process.register("a", "x"),))
    row = registered.row
    assert (row.number, row.duplicates) == (2, 1)
    with process.database.reading() as session:
        first = datasets.version(session, row.dataset_id, 1)
    # The holdout is that of the second split, and the artifact of the first one is intact.
    folder, earlier = (process.artifacts.open(each.artifact_key) for each in (row, first))
    held_out = process.held_out(row)
    trained = {document.text for document in training_documents(folder, [earlier], [])}
    assert held_out | trained == {"b", "c"}
    assert len(held_out) == row.holdout_documents == 1
    for key in process.artifacts.keys("data"):
        process.artifacts.open(key)


def test_many_versions_in_between_only_delay_a_body(process: Process) -> None:
    meanwhile = tuple(lambda text=text: process.register(f"beside {text}", text) for text in "abcd")
    row = process.register(*"abcdef", meanwhile=meanwhile).row
    assert (row.number, row.duplicates) == (5, 4)


def test_content_that_came_in_between_is_its_row(process: Process) -> None:
    registered = process.register("a", "b", meanwhile=(lambda: process.register("a", "b"),))
    assert (registered.created, registered.row.number) == (False, 1)
    assert process.count(DataVersion) == 1


def test_a_body_has_nothing_new_if_all_of_it_came_in_between(process: Process) -> None:
    with pytest.raises(NothingNew):
        process.register("a", "b", meanwhile=(lambda: process.register("b", "a", "c"),))
    assert process.count(DataVersion) == 1


def test_a_slice_that_came_in_between_counts(process: Process) -> None:
    row = process.register(*"abcd", meanwhile=(lambda: process.upload_slice("suite", "a", "b"),)).row
    assert (row.documents, row.duplicates, row.holdout_documents) == (4, 0, 1)
    assert process.held_out(row) < {"c", "d"}


def test_an_exclusion_that_came_in_between_counts(process: Process) -> None:
    process.register("a", "b")
    registered = process.register("a", "c", meanwhile=(lambda: process.exclude(1),))
    assert (registered.row.number, registered.row.duplicates) == (2, 0)
    assert len(registered.published) == 2


@pytest.mark.parametrize("texts", [("b", "a"), ("b", "a", "c", "e")])
def test_documents_of_an_excluded_version_are_new_again(process: Process, texts: tuple[str, ...]) -> None:
    process.register("a", "b")
    process.register("c", "d")
    process.exclude(1)
    again = process.register(*texts)
    assert (again.created, again.row.number) == (True, 3)
    assert again.row.duplicates == len({"c"} & set(texts))
    later = process.register("a", "d", "x")
    assert (later.row.number, later.row.duplicates, len(later.published)) == (4, 2, 1)


def test_documents_of_a_slice_are_not_held_out(process: Process) -> None:
    process.register("x")
    process.register("y")
    texts = sorted("abcdefghijkl", key=document_hash)
    uploaded = set(texts[:4])  # the lowest hashes, which would be held out
    process.upload_slice("suite", *uploaded)
    for body in ((*texts[:3], *texts[4:8]), (texts[3], *texts[8:10]), (*texts[10:12], "z")):
        registered = process.register(*body)
        assert registered.published == [registered.row.artifact_key]
        held_out = process.held_out(registered.row)
        assert len(held_out) == registered.row.holdout_documents == 1
        assert held_out.isdisjoint(uploaded)


def test_an_artifact_that_was_collected_in_between_is_published_again(process: Process) -> None:
    def collect() -> None:
        [key] = process.artifacts.keys("data")
        process.artifacts.unpublish([key])

    registered = process.register(*"abcd", meanwhile=(collect, collect))
    assert len(registered.published) == 3
    process.artifacts.open(registered.row.artifact_key)
