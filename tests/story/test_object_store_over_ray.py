"""The object store is down for 90 s during training over Ray: no partial artifact is visible, and the bits are the same."""

import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from api.client import Client
from service.artifacts import open_artifacts
from service.artifacts.object_store import RETRY_SECONDS
from service.core.errors import Unavailable
from service.core.retry import MAX_ATTEMPTS
from service.core.stage_specs import StageKind
from service.core.states import StageState, UpdateState
from service.store.database import Database
from service.store.tables import Stage
from tests.support.artifacts import published_keys
from tests.support.database import Databases
from tests.support.s3 import BUCKET, s3_server
from tests.support.undisturbed import MODEL, Undisturbed, first_version, push_second
from tests.support.up import running_up
from tests.support.waiting import until
from tests.support.watched_update import WatchedUpdate

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Longer than it takes for an attempt to be lost. The trunk still has two checkpoints and its end to publish, and each
# waits for the store in turn.
DOWN_SECONDS = 30 + 3 * RETRY_SECONDS
POLL_SECONDS = 0.2


class StoreObserver:
    """Polls the store from a host with an empty cache and opens every artifact as soon as it is published."""

    def __init__(self, url: str, cache: Path) -> None:
        self.seen: set[str] = set()
        self.damaged: list[str] = []
        self.outages = 0
        self._artifacts = open_artifacts(f"{url}#cache={cache}")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll_until_stopped)

    def __enter__(self) -> "StoreObserver":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.poll()

    def poll(self) -> None:
        for key in published_keys(self._artifacts):
            if key not in self.seen:
                try:
                    self._artifacts.open(key)
                except Unavailable:
                    raise
                except Exception as error:
                    self.damaged.append(f"{key}: {error!r}")
                self.seen.add(key)

    def _poll_until_stopped(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                self.poll()
            except Unavailable:
                self.outages += 1


def test_an_update_over_ray_waits_for_a_store_that_is_down_and_loses_nothing(
    undisturbed: Undisturbed, databases: Databases, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/{tmp_path.name}"  # a key of its own: servers in one process share their content
    with s3_server() as s3:
        settings = first_version(tmp_path / "home", databases, artifacts_url=url)
        database = Database(settings.database)
        artifacts = open_artifacts(f"{url}#cache={tmp_path / 'cache'}")
        with (
            running_up(settings) as up,
            Client(up.urls["api"]) as client,
            StoreObserver(url, tmp_path / "seen") as observer,
        ):
            watched = WatchedUpdate(client, database, artifacts, push_second(client))
            until(lambda: watched.is_past_a_checkpoint(StageKind.TRAIN_TRUNK))
            with s3.down():
                began = time.monotonic()
                while time.monotonic() - began < DOWN_SECONDS:
                    assert not watched.has_ended(), watched.update()
                    time.sleep(POLL_SECONDS)
            until(watched.has_ended)
            update, second = watched.update(), client.model_version(MODEL, 2)
            failures = watched.failed_attempts()
            assert update.state == UpdateState.SUCCEEDED, update.error
            losses = {kind: watched.losses(kind) for kind in undisturbed.losses}
        assert second.artifact.sha256 == undisturbed.second.artifact.sha256
        assert second.evaluations == undisturbed.second.evaluations
        assert losses == undisturbed.losses

        assert observer.outages
        assert not observer.damaged
        with database.reading() as session:
            rows = session.scalars(sa.select(Stage)).all()
        assert {row.state for row in rows} == {StageState.SUCCEEDED}
        assert {row.key for row in rows} - {None} <= observer.seen
        # All failed attempts were lost to the store, and none of them counts.
        assert {failed["code"] for failed in failures} == {Unavailable.code}
        assert all(row.attempt - (row.max_attempts - MAX_ATTEMPTS) == 1 for row in rows if not row.reused)
        database.close()
