"""Registering data: what is written with a version, and what happens when others come in between."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.artifacts import LocalArtifacts
from service.core.errors import Conflict, InvalidRequest, NotFound, NothingNew
from service.ingest.formats import DataFormat
from service.ingest.ingest import Ingest, Ingested
from service.ingest.reading import read_documents, training_documents
from service.register_data import (
    RegisteredSlice,
    check_slice,
    create_dataset,
    register_slice,
)
from service.register_versions import VersionRegistrar
from service.store import datasets
from service.store.database import Database
from service.store.tables import DataVersion, Event, Update
from service.version_rounds import RegisteredVersion
from tests.support.control_plane import ndjson
from tests.support.rows import add_model


class House:
    """A database and artifacts, and the shortest way of registering texts in them."""

    def __init__(self, database: Database, root: Path) -> None:
        self.database = database
        self.artifacts = LocalArtifacts(root)
        self.registrar = VersionRegistrar(database, self.artifacts)
        create_dataset(database, "d", holdout_fraction=0.25)

    def register(self, *texts: str, label: str | None = None, ingest: Any = Ingest) -> RegisteredVersion:
        with ingest(self.artifacts, DataFormat.NDJSON) as sink:
            sink.feed(ndjson(*texts))
            return self.registrar.register("d", sink, sink.end(), label=label)

    def give(self, name: str, *texts: str, data_version: int | None = None) -> RegisteredSlice:
        with Ingest(self.artifacts, DataFormat.NDJSON) as sink:
            sink.feed(ndjson(*texts))
            sink.end()
            return register_slice(self.database, "d", sink, name=name, data_version=data_version)

    def meanwhile(self, *happenings: Callable[[], object]) -> Any:
        """An Ingest during whose first publications these things happen, one each."""
        left = list(happenings)

        class Interrupted(Ingest):
            def publish_version(self, *earlier: Any, **known: Any) -> Ingested:
                published = super().publish_version(*earlier, **known)
                if left:
                    left.pop(0)()
                return published

        return Interrupted

    def folder(self, key: str) -> Path:
        return self.artifacts.open(key)

    def count(self, table: Any) -> int:
        with self.database.reading() as session:
            return session.scalar(sa.select(sa.func.count()).select_from(table)) or 0


@pytest.fixture
def house(database: Database, tmp_path: Path) -> House:
    return House(database, tmp_path / "artifacts")


def test_a_version_its_updates_and_the_events_are_written_together(house: House) -> None:
    with house.database.transaction() as session:
        dataset = datasets.dataset(session, "d")
        followers = [add_model(session, dataset, name).id for name in ("a", "b")]
        quiet = add_model(session, dataset, "c")
        quiet.spec = {**quiet.spec, "auto_update": False}
    registered = house.register(*"abcdefgh", label="first")
    assert registered.created
    row = registered.row
    assert (row.number, row.label, row.documents, row.holdout_documents) == (1, "first", 8, 2)
    with house.database.reading() as session:
        updates = session.scalars(sa.select(Update)).all()
        assert sorted(update.model_id for update in updates) == sorted(followers)
        assert {(update.state, update.data_version_id) for update in updates} == {("pending", row.id)}
        types = session.scalars(sa.select(Event.type).order_by(Event.id)).all()
    assert types == ["dataset.created", "data_version.created", "update.created", "update.created"]


def test_the_same_content_is_the_same_row_though_all_of_it_is_known(house: House) -> None:
    first = house.register("a", "b")
    again = house.register("a", "b")
    assert (again.row.id, again.created) == (first.row.id, False)
    assert house.count(DataVersion) == 1


def test_nothing_new_stores_nothing(house: House) -> None:
    house.register("a", "b")
    with pytest.raises(NothingNew):
        house.register("b", "a")
    assert house.count(DataVersion) == 1
    assert len(house.artifacts.keys("data")) == 1


def test_numbers_go_on_and_duplicates_count_what_came_before(house: House) -> None:
    house.register("a", "b")
    house.register("b", "c", "d")
    row = house.register("a", "d", "e").row
    assert (row.number, row.duplicates) == (3, 2)


def test_a_version_that_came_in_between_is_reckoned_with(house: House) -> None:
    registered = house.register("a", "b", "c", ingest=house.meanwhile(lambda: house.register("a", "x")))
    row = registered.row
    assert (row.number, row.duplicates) == (2, 1)
    with house.database.reading() as session:
        first = datasets.version(session, row.dataset_id, 1)
    # The holdout is that of the second reckoning, and the first one's artifact is intact beside it.
    folder, earlier = house.folder(row.artifact_key), house.folder(first.artifact_key)
    held_out = {document.text for document in read_documents(folder, "holdout.ndjson.zst")}
    trained = {document.text for document in training_documents(folder, [earlier], [])}
    assert held_out | trained == {"b", "c"}
    assert len(held_out) == row.holdout_documents == 1
    for key in house.artifacts.keys("data"):
        house.artifacts.open(key)


def test_many_that_come_in_between_only_delay(house: House) -> None:
    happenings = [lambda text=text: house.register(f"beside {text}", text) for text in "abcd"]
    row = house.register(*"abcdef", ingest=house.meanwhile(*happenings)).row
    assert (row.number, row.duplicates) == (5, 4)


def test_what_came_in_between_and_was_a_duplicate_already_changes_nothing(house: House) -> None:
    house.register("a", "x")
    divided: list[int] = []

    class Counted(Ingest):
        def publish_version(self, *earlier: Any, **known: Any) -> Ingested:
            divided.append(1)
            if len(divided) == 1:
                house.register("a", "y")
            return super().publish_version(*earlier, **known)

    row = house.register("a", "b", ingest=Counted).row
    assert (row.number, row.duplicates, len(divided)) == (3, 1, 1)


def test_the_same_content_that_came_in_between_is_its_row(house: House) -> None:
    registered = house.register("a", "b", ingest=house.meanwhile(lambda: house.register("a", "b")))
    assert (registered.created, registered.row.number) == (False, 1)
    assert house.count(DataVersion) == 1


def test_all_of_it_came_in_between_as_other_content(house: House) -> None:
    with pytest.raises(NothingNew):
        house.register("a", "b", ingest=house.meanwhile(lambda: house.register("b", "a", "c")))
    assert house.count(DataVersion) == 1


def test_a_slice_that_came_in_between_is_reckoned_with(house: House) -> None:
    give = house.meanwhile(lambda: house.give("suite", "a", "b"))
    row = house.register(*"abcd", ingest=give).row
    assert (row.documents, row.duplicates, row.holdout_documents) == (4, 0, 1)
    held_out = {d.text for d in read_documents(house.folder(row.artifact_key), "holdout.ndjson.zst")}
    assert held_out < {"c", "d"}


def test_slices_are_immutable(house: House) -> None:
    first = house.give("suite", "a", data_version=3)
    assert first.created
    again = house.give("suite", "a", data_version=3)
    assert (again.row.id, again.created) == (first.row.id, False)
    with pytest.raises(Conflict):
        house.give("suite", "b", data_version=3)
    with pytest.raises(Conflict):
        house.give("suite", "a")


def test_a_slice_cannot_take_the_name_of_a_holdout(house: House) -> None:
    check_slice(house.database, "d", "v")
    check_slice(house.database, "d", "version1")
    with pytest.raises(InvalidRequest):
        check_slice(house.database, "d", "v12")
    with pytest.raises(NotFound):
        check_slice(house.database, "nobody", "suite")


def test_names_of_datasets_are_unique(house: House) -> None:
    with pytest.raises(Conflict):
        create_dataset(house.database, "d")


def test_what_was_found_and_collected_before_it_was_registered_is_published_again(house: House) -> None:
    def collect() -> None:
        [key] = [key for kind in ("data", "slice") for key in house.artifacts.keys(kind)]
        house.artifacts.unpublish([key])

    made = house.register("a", "b", "c", "d", ingest=house.meanwhile(collect, collect))
    house.artifacts.open(made.row.artifact_key)


def test_so_is_a_slice(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = Ingest.publish_slice
    collected: list[str] = []

    def publish_and_lose(self: Ingest) -> Ingested:
        ingested = publish(self)
        if not collected:
            collected.append(ingested.manifest.key)
            house.artifacts.unpublish(collected)
        return ingested

    monkeypatch.setattr(Ingest, "publish_slice", publish_and_lose)
    made = house.give("suite", "a", "b")
    assert collected == [made.row.artifact_key]
    house.artifacts.open(made.row.artifact_key)
