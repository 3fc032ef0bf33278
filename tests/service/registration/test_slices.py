"""Registering uploaded evaluation sets: they are immutable, and cannot take the name of a holdout."""

import pytest

from service.core.errors import Conflict, InvalidRequest, NotFound
from service.registration.slices import check_slice
from tests.service.registration.harness import Process


def test_a_slice_is_immutable(process: Process) -> None:
    first = process.upload_slice("suite", "a", data_version=3)
    assert first.created
    again = process.upload_slice("suite", "a", data_version=3)
    assert (again.row.id, again.created) == (first.row.id, False)
    with pytest.raises(Conflict):
        process.upload_slice("suite", "b", data_version=3)
    with pytest.raises(Conflict):
        process.upload_slice("suite", "a")


def test_a_slice_cannot_take_the_name_of_a_holdout(process: Process) -> None:
    check_slice(process.database, "d", "v")
    check_slice(process.database, "d", "version1")
    with pytest.raises(InvalidRequest):
        check_slice(process.database, "d", "v12")
    with pytest.raises(NotFound):
        check_slice(process.database, "unknown", "suite")


def test_an_artifact_that_was_collected_in_between_is_published_again(process: Process) -> None:
    def collect() -> None:
        [key] = process.artifacts.keys("slice")
        process.artifacts.unpublish([key])

    registered = process.upload_slice("suite", "a", "b", meanwhile=(collect,))
    process.artifacts.open(registered.row.artifact_key)
