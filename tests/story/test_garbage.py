"""Collecting garbage between updates of a line that really trains changes no bit of it."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from service.artifacts import open_artifacts
from service.artifacts.garbage import find_garbage, remove_garbage
from service.store.tables import ModelVersion
from tests.story.conftest import NewPlane, Workers
from tests.support.control_plane import ControlPlane
from tests.support.s3 import BUCKET, s3_server
from tests.support.story import SPEC, push_and_release

pytestmark = pytest.mark.slow

# Checkpoints of the trunk and of every branch, while they run.
OFTEN = SPEC | {"training": SPEC["training"] | {"checkpoint_every": 3}}


def collect(plane: ControlPlane) -> set[str]:
    """What was collected, but the copies that an object store's cache holds; the kinds of it."""
    found = find_garbage(plane.database, plane.artifacts, older_than_seconds=-1)
    removed = remove_garbage(plane.database, plane.artifacts, found)
    assert removed == found
    assert find_garbage(plane.database, plane.artifacts, older_than_seconds=-1) == []
    return {item.key.partition("/")[0] for item in removed}


def test_a_line_goes_on_to_the_same_bits(new_plane: NewPlane, workers: Workers, tmp_path: Path) -> None:
    plane = new_plane()
    plane.client.create_model(OFTEN)
    executor, serving = workers(plane)
    expected = [push_and_release(plane, number, executor, serving) for number in (1, 2, 3)]

    with s3_server():
        stored = new_plane(artifacts_url=f"s3://{BUCKET}/{tmp_path.name}")
        for tidy in (new_plane(), stored):
            tidy.client.create_model(OFTEN)
            executor, serving = workers(tidy)
            for number, like in enumerate(expected, start=1):
                made = push_and_release(tidy, number, executor, serving)
                assert made.artifact.sha256 == like.artifact.sha256
                assert made.evaluations == like.evaluations
                assert collect(tidy) == {"trunk", "run-checkpoint"}
            executor.close()
        empty = open_artifacts(f"s3://{BUCKET}/{tmp_path.name}#cache={tmp_path / 'empty'}")
        with stored.database.reading() as session:
            exports = [row.export_key for row in session.scalars(sa.select(ModelVersion))]
        for key in exports:
            empty.open(key)
