"""Garbage collection between the updates of a line changes none of its bits."""

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

# The trunk and every branch publish checkpoints while they run.
FREQUENT_CHECKPOINTS = SPEC | {"training": SPEC["training"] | {"checkpoint_every": 3}}


def collect(plane: ControlPlane) -> set[str]:
    """Remove all garbage. Returns the kinds of the artifacts removed."""
    garbage = find_garbage(plane.database, plane.artifacts, older_than_seconds=-1)
    removed = remove_garbage(plane.database, plane.artifacts, garbage)
    assert removed == garbage
    assert find_garbage(plane.database, plane.artifacts, older_than_seconds=-1) == []
    return {item.key.partition("/")[0] for item in removed}


def test_garbage_collection_changes_no_bits_of_a_line(
    new_plane: NewPlane, workers: Workers, tmp_path: Path
) -> None:
    plane = new_plane()
    plane.client.create_model(FREQUENT_CHECKPOINTS)
    executor, serving = workers(plane)
    expected = [push_and_release(plane, number, executor, serving) for number in (1, 2, 3)]

    with s3_server():
        stored = new_plane(artifacts_url=f"s3://{BUCKET}/{tmp_path.name}")
        for collected in (new_plane(), stored):
            collected.client.create_model(FREQUENT_CHECKPOINTS)
            executor, serving = workers(collected)
            for number, uncollected in enumerate(expected, start=1):
                version = push_and_release(collected, number, executor, serving)
                assert version.artifact.sha256 == uncollected.artifact.sha256
                assert version.evaluations == uncollected.evaluations
                assert collect(collected) == {"trunk", "run-checkpoint"}
            executor.close()
        empty_cache = open_artifacts(f"s3://{BUCKET}/{tmp_path.name}#cache={tmp_path / 'empty'}")
        with stored.database.reading() as session:
            exports = [row.export_key for row in session.scalars(sa.select(ModelVersion))]
        for key in exports:
            empty_cache.open(key)
