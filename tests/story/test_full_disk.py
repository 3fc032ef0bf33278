"""The disk with the database and the artifacts fills up repeatedly: updates still finish, with the same bits."""

import random
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.core.states import StageState, UpdateState
from service.store.tables import DataVersion, Event, Stage
from tests.story.conftest import Workers
from tests.support.control_plane import ControlPlane, serve, settings_of
from tests.support.database import Databases
from tests.support.small_disk import SmallDisk, small_disk
from tests.support.story import DATASET, DOCUMENTS, SPEC, push_and_release
from tests.support.training import texts_of

pytestmark = pytest.mark.slow_on_postgres

MIB = 1 << 20
OFTEN = SPEC | {"training": SPEC["training"] | {"checkpoint_every": 3}}
SECONDS = 60.0


def push_until_accepted(plane: ControlPlane, number: int) -> int:
    """Push a data version and retry until it is accepted, as a client would. Returns the number of refusals."""
    refused = 0
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        answer = plane.push(DATASET, *texts_of(number, DOCUMENTS))
        if answer.status_code in (200, 201):
            return refused
        assert answer.status_code == 503, answer.text
        assert answer.headers["Retry-After"]
        refused += 1
        time.sleep(0.1)
    raise AssertionError("the data version was never accepted")


def test_a_disk_that_fills_up_repeatedly_loses_nothing(
    databases: Databases, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.core.retry.LONGEST_WAIT_SECONDS", 0.2)
    monkeypatch.setattr("service.core.retry.FIRST_WAIT_SECONDS", 0.1)
    with small_disk(tmp_path / "disk", 64 * MIB) as disk:
        homes = {name: tmp_path / name for name in ("whole", "disk")}
        versions = {}
        refused = failed = 0
        for name, home in homes.items():
            home.mkdir(exist_ok=True)
            with serve(settings_of(home, databases.new(home))) as plane:
                plane.client.create_dataset(DATASET, holdout_fraction=0.1)
                plane.client.create_model(OFTEN)
                executor, serving = workers(plane)
                if name == "whole":
                    versions[name] = [push_and_release(plane, number, executor, serving) for number in (1, 2)]
                    continue
                filled = threading.Event()
                filler = threading.Thread(target=fill_repeatedly, args=(disk, filled))
                filler.start()
                try:
                    with plane.orchestrated(executor, serving):
                        refused = sum(push_until_accepted(plane, number) for number in (1, 2))
                        wait_for_end(plane)
                finally:
                    filled.set()
                    filler.join()
                with plane.orchestrated(executor, serving):
                    wait_for_end(plane)
                versions[name] = list(plane.client.model_versions("m"))
                check_rows(plane)
                failed = attempts_failed(plane)
                executor.close()
    assert [row.artifact.sha256 for row in versions["disk"]] == [
        row.artifact.sha256 for row in versions["whole"]
    ]
    assert versions["disk"][-1].evaluations == versions["whole"][-1].evaluations
    assert refused + failed > 0, "nothing failed, so the disk was never full at a critical moment"


def fill_repeatedly(disk: SmallDisk, stop: threading.Event) -> None:
    """Fill and clear the disk at random times, a fraction of a second each."""
    rng = random.Random(4)
    while not stop.is_set():
        stop.wait(rng.uniform(0.05, 0.5))
        disk.fill(leave=rng.choice([0, 0, 4096, 65_536, 300_000]))
        stop.wait(rng.uniform(0.1, 0.4))
        disk.clear()


def wait_for_end(plane: ControlPlane) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        updates = list(plane.client.updates("m"))
        states = {update.state for update in updates}
        if len(updates) == 2 and states == {UpdateState.SUCCEEDED}:
            return
        assert not states & {UpdateState.FAILED, UpdateState.REJECTED}, updates
        time.sleep(0.1)
    raise AssertionError("the updates did not end")


def check_rows(plane: ControlPlane) -> None:
    """Every artifact that a row names is on the disk, and nothing was created twice."""
    with plane.database.reading() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(DataVersion)) == 2
        for key in session.scalars(sa.select(DataVersion.artifact_key)):
            plane.artifacts.open(key)
        for stage in session.scalars(sa.select(Stage)):
            assert stage.state == StageState.SUCCEEDED
            if stage.key is not None:
                plane.artifacts.open(stage.key)
        kinds = list(session.scalars(sa.select(Event.type)))
    assert kinds.count("version.candidate") == 2
    assert kinds.count("data_version.created") == 2


def attempts_failed(plane: ControlPlane) -> int:
    return sum(event.type == "stage.attempt_failed" for event in plane.client.events())
