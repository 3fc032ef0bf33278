"""`pathswitch up` stops under load within 30 s, without breaking a request or losing anything."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from api.client import Client, DataFormat
from service.artifacts import open_artifacts
from service.core.stopping import ALL_SECONDS
from service.settings import Settings
from service.store.database import Database
from tests.support.control_plane import ndjson
from tests.support.stopping import (
    LONG,
    Newcomers,
    Streams,
    assert_resumed_exactly,
    assert_stopped_at_a_checkpoint,
    push,
    undisturbed,
    wait_until_it_trains,
    wait_until_released,
)
from tests.support.story import DATASET
from tests.support.up import Up, assert_nothing_is_left

# Over Ray, progress and stop requests travel only twice a second, so training must last longer.
LONGER: dict[str, Any] = LONG | {"training": LONG["training"] | {"epochs": 24}}
LATE_SECONDS = 2.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "model"),
    [
        pytest.param("local", LONG, id="without Ray"),
        pytest.param("ray", LONGER, marks=pytest.mark.ray, id="over Ray"),
    ],
)
def test_up_finishes_everything_in_flight_and_resumes_training_where_it_stopped(
    home: Path, tmp_path: Path, executor: str, model: dict[str, Any]
) -> None:
    settings = Settings(home=home)
    database, artifacts = Database(settings.database), open_artifacts(settings.artifacts)
    up = Up(home, PATHSWITCH_EXECUTOR=executor)
    up.wait_until_ready()
    urls = up.urls
    late = threading.Event()

    def slow_body() -> Iterator[bytes]:
        yield ndjson("a")
        assert late.wait(60)
        yield ndjson("b")

    def upload() -> int:
        with Client(urls["api"]) as client:
            return client.push_version("other", slow_body(), format=DataFormat.NDJSON).row.documents

    with Client(urls["api"]) as client, ThreadPoolExecutor() as uploads:
        client.create_dataset("other")
        client.create_dataset(DATASET, holdout_fraction=0.1)
        client.create_model(model)
        push(client, 1)
        wait_until_released(client, 1)
        uploaded = uploads.submit(upload)
        push(client, 2)
        wait_until_it_trains(database, 2)
        with Newcomers(urls["serve"]) as newcomers, Streams(urls["serve"]) as streams:
            assert streams.under_way == streams.number
            threading.Timer(LATE_SECONDS, late.set).start()
            began = time.monotonic()
            lines = up.ended_with(signal.SIGTERM)
            seconds = time.monotonic() - began
    print(f"stopped in {seconds:.1f} s; newcomers: {dict(newcomers.answers)}")
    assert lines[-1] == "pathswitch: stopped"
    assert LATE_SECONDS < seconds < ALL_SECONDS
    assert_nothing_is_left(up, urls)
    assert not streams.broken
    assert streams.whole == streams.number
    assert uploaded.result() == 2
    assert not newcomers.surprised
    assert newcomers.answers["thrown out"] <= 1
    assert newcomers.answers["not let in"] > 0
    reached = assert_stopped_at_a_checkpoint(database, artifacts, 2)

    again = Up(home, PATHSWITCH_EXECUTOR=executor)
    again.wait_until_ready()
    with Client(again.urls["api"]) as client:
        wait_until_released(client, 2)
        exports = [client.model_version("m", number).artifact.sha256 for number in (1, 2)]
    assert_resumed_exactly(database, 2, reached)
    database.close()
    assert again.ended_with(signal.SIGTERM)[-1] == "pathswitch: stopped"
    if executor == "ray":  # without Ray, the orchestrator's own tests compare them
        assert exports == undisturbed(tmp_path / "undisturbed", model, 2)
