"""Artifacts in an object store: the same bits as on disk, and updates survive an outage of the store."""

import threading
import time
from pathlib import Path

import pytest

from service.artifacts import open_artifacts
from service.core.states import UpdateState
from service.store import models
from tests.story.conftest import NewPlane, Workers
from tests.support.s3 import BUCKET, s3_server
from tests.support.story import DATASET, DOCUMENTS, SPEC, download, push_and_release
from tests.support.training import texts_of

pytestmark = pytest.mark.slow_on_postgres

DOWN_SECONDS = 4.0


@pytest.mark.slow
def test_a_line_in_an_object_store_has_the_same_bits_in_spite_of_an_outage(
    new_plane: NewPlane, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.artifacts.object_store.RETRY_SECONDS", 0.5)
    on_disk = new_plane()
    on_disk.client.create_model(SPEC)
    executor, serving = workers(on_disk)
    expected = [push_and_release(on_disk, number, executor, serving) for number in (1, 2)]

    with s3_server() as s3:
        plane = new_plane(artifacts_url=f"s3://{BUCKET}/{tmp_path.name}")
        plane.client.create_model(SPEC)
        executor, serving = workers(plane)
        first = push_and_release(plane, 1, executor, serving)

        plane.push(DATASET, *texts_of(2, DOCUMENTS)).raise_for_status()
        with plane.orchestrated(executor, serving):
            ended = threading.Event()

            def outage() -> None:
                with s3.down():
                    time.sleep(DOWN_SECONDS)
                ended.set()

            threading.Thread(target=outage).start()
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                states = [update.state for update in plane.client.updates("m")]
                if ended.is_set() and states == [UpdateState.SUCCEEDED] * 2:
                    break
                time.sleep(0.2)
        [_, update] = plane.client.updates("m")
        assert update.state == UpdateState.SUCCEEDED, update.error
        second = plane.client.model_version("m", 2)
        for stored, local in zip((first, second), expected, strict=True):
            assert stored.artifact.sha256 == local.artifact.sha256
            assert stored.evaluations == local.evaluations
            assert stored.artifact.path.startswith(f"s3://{BUCKET}/{tmp_path.name}/")

        # A host with an empty cache.
        empty = open_artifacts(f"s3://{BUCKET}/{tmp_path.name}#cache={tmp_path / 'empty'}")
        with plane.database.reading() as session:
            row = models.version(session, models.model(session, "m").id, 2)
        folder = empty.open(row.export_key)
        downloaded = download(plane, second, tmp_path / "downloaded")
        assert (folder / "model.safetensors").read_bytes() == (downloaded / "model.safetensors").read_bytes()
        executor.close()
