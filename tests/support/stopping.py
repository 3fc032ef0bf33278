"""Clients and checks for graceful stops: streams must complete, and training must resume at the step it reached."""

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from api.client import Client, DataFormat
from service.artifacts import Artifacts, open_artifacts
from service.core.plan import checkpoint_key
from service.core.retry import MAX_ATTEMPTS
from service.core.stage_specs import StageKind, TrainStage
from service.core.states import StageState
from service.store import metrics, migrate
from service.store.database import Database
from service.store.tables import Stage
from tests.support.control_plane import ndjson, serve, settings_of
from tests.support.story import DATASET, DOCUMENTS, SPEC, push_and_release
from tests.support.training import SMALL_CONFIG, texts_of
from workers.executors.local_executor import LocalExecutor
from workers.serving.local_serving import LocalServing

PATIENCE_SECONDS = 120.0
# Trains for some seconds, and writes a checkpoint on the way only if it is stopped.
LONG: dict[str, Any] = SPEC | {
    "architecture": {"config": SMALL_CONFIG | {"max_position_embeddings": 1024}},
    "training": SPEC["training"] | {"precision": "fp32", "epochs": 6, "checkpoint_every": 100_000},
}
# Per stream. Few enough that the engine decodes three streams at once, and long enough to take several seconds.
CHOICES, CHOICE_TOKENS = 5, 500
END_TOKEN = "0"  # the end-of-text id of a tokenizer trained with the line


@dataclass
class Streams:
    """Clients that each read one long streamed completion. The block begins when every client has its first event."""

    url: str  # ends with /v1
    number: int = 3
    whole: int = 0
    broken: list[str] = field(default_factory=list)

    def __enter__(self) -> "Streams":
        started = [threading.Event() for _ in range(self.number)]
        self._threads = [threading.Thread(target=self._ask, args=(event,)) for event in started]
        for thread in self._threads:
            thread.start()
        assert all(event.wait(PATIENCE_SECONDS) for event in started)
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()

    @property
    def under_way(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def _ask(self, started: threading.Event) -> None:
        body = {"model": "m", "prompt": ["1 a"] * CHOICES, "max_tokens": CHOICE_TOKENS, "stream": True}
        body["logit_bias"] = {END_TOKEN: -100}  # so that no stream ends before the others start
        events: list[str] = []
        try:
            with httpx.stream("POST", f"{self.url}/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    if line:
                        events.append(line.removeprefix("data: "))
                    if len(events) == 1:
                        started.set()
            assert events[-1] == "[DONE]", f"{response.status_code} {events[-1]}"
            events.pop()
            choices = [json.loads(event)["choices"][0] for event in events]
            assert len([choice for choice in choices if choice["finish_reason"]]) == CHOICES
            self.whole += 1
        except (httpx.HTTPError, AssertionError, IndexError, KeyError) as error:
            self.broken.append(f"{type(error).__name__} after {len(events)} events: {error}")
        finally:
            started.set()


@dataclass
class Newcomers:
    """A client that requests one token again and again, over a new connection each time, until the block ends.

    Each request may be answered, get a 503 with Retry-After, or be refused by the kernel ("not let in"). If the server
    closes its listener while the connection is in the backlog, the kernel resets it ("thrown out"). That can happen to
    one request at most.
    """

    url: str  # ends with /v1
    answers: Counter[str] = field(default_factory=Counter)
    surprised: list[str] = field(default_factory=list)

    def __enter__(self) -> "Newcomers":
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._ask_until_stopped)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _ask_until_stopped(self) -> None:
        body = {"model": "m", "prompt": "1 a", "max_tokens": 1}
        while not self._stopping.wait(0.02):
            try:
                response = httpx.post(f"{self.url}/completions", json=body, timeout=60)
                answer = str(response.status_code)
                if response.status_code == 503:
                    answer = response.json()["error"]["code"]
                    assert response.headers["retry-after"]
            except httpx.ConnectError:
                answer = "not let in"
            except (httpx.ReadError, httpx.RemoteProtocolError):
                answer = "thrown out"
            except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
                answer = f"{type(error).__name__}: {error}"
            self.answers[answer] += 1
            if answer not in ("200", "service_stopping", "thrown out", "not let in"):
                self.surprised.append(answer)


def push(client: Client, number: int) -> None:
    """Push the story's data version ``number``."""
    client.push_version(DATASET, [ndjson(*texts_of(number, DOCUMENTS))], format=DataFormat.NDJSON)


def undisturbed(home: Path, model: Mapping[str, Any], versions: int) -> list[str]:
    """Train ``versions`` versions of a model without a stop. Returns the hashes of their exports."""
    settings = settings_of(home, f"sqlite:///{home / 'pathswitch.db'}")
    migrate.upgrade(settings.database)
    artifacts = open_artifacts(settings.artifacts)
    executor, serving = LocalExecutor(artifacts), LocalServing(artifacts, "127.0.0.1", 0)
    with serve(settings) as plane:
        plane.client.create_dataset(DATASET, holdout_fraction=0.1)
        plane.client.create_model(model)
        numbers = range(1, versions + 1)
        released = [push_and_release(plane, number, executor, serving) for number in numbers]
    serving.close()
    executor.close()
    return [version.artifact.sha256 for version in released]


def trunk(database: Database, number: int) -> Stage | None:
    """The trunk stage of the line's ``number``-th update, or None if it is not planned yet."""
    with database.reading() as session:
        trunks = session.scalars(
            sa.select(Stage).where(Stage.kind == StageKind.TRAIN_TRUNK).order_by(Stage.id)
        )
        return dict(enumerate(trunks, start=1)).get(number)


def wait_until_it_trains(database: Database, number: int, *, attempt: int = 1, steps: int = 12) -> None:
    """Wait until this attempt at the update's trunk has trained ``steps`` steps."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        stage = trunk(database, number)
        if stage is not None and stage.attempt == attempt and stage.progress is not None:
            assert stage.state == StageState.RUNNING
            if stage.progress["step"] - stage.progress["first_step"] >= steps:
                return
        assert time.monotonic() < deadline, stage and (stage.state, stage.error)
        time.sleep(0.01)


def wait_until_released(client: Client, number: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(release.version == number and release.state == "live" for release in client.releases("m")):
        assert time.monotonic() < deadline, [(update.state, update.error) for update in client.updates("m")]
        time.sleep(0.1)


def trained_steps(database: Database, stage: Stage) -> list[int]:
    with database.reading() as session:
        return [point.step for point in metrics.points(session, stage.id)]


def assert_stopped_at_a_checkpoint(database: Database, artifacts: Artifacts, number: int) -> int:
    """The update's trunk is ready to resume, with a checkpoint of the last step it trained. Returns that step."""
    stage = trunk(database, number)
    assert stage is not None
    assert (stage.state, stage.attempt, stage.owner, stage.run_id) == (StageState.READY, 1, None, None)
    assert stage.error is not None
    assert stage.error["code"] == "stopped"
    spec = TrainStage.model_validate(stage.spec)
    reached = trained_steps(database, stage)[-1]
    assert spec.from_step < reached < spec.to_step
    assert artifacts.manifest(checkpoint_key(spec, reached)) is not None
    return reached


def assert_resumed_exactly(database: Database, number: int, reached: int) -> None:
    """Each step of the update's trunk was trained once: by the first attempt up to ``reached``, then by the second."""
    stage = trunk(database, number)
    assert stage is not None
    assert stage.state == StageState.SUCCEEDED
    assert stage.attempt == 2
    assert stage.max_attempts == MAX_ATTEMPTS + 1, "a stop must not count as a failed attempt"
    assert stage.result is not None
    spec = TrainStage.model_validate(stage.spec)
    assert stage.result["resumed_from_step"] == reached
    assert stage.result["trained_tokens"] == stage.result["tokens"]
    assert trained_steps(database, stage) == list(range(spec.from_step + 1, spec.to_step + 1))
