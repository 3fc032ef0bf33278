"""A whole update over real Ray and Ray Serve, seen through the openai client, compared with one without Ray."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from ray import serve

from service.artifacts import open_artifacts
from service.core.paradigms import PARADIGMS
from tests.story.conftest import NewPlane, Workers
from tests.support.control_plane import ControlPlane
from tests.support.ports import free_ports
from tests.support.ray_cluster import RayCluster
from tests.support.story import DATASET, DOCUMENTS, SPEC, download, greedy, push_and_release, released
from tests.support.training import texts_of
from tests.support.waiting import until
from workers.executors.ray_executor import RayExecutor
from workers.serving.ray.serving import RayServing

pytestmark = [pytest.mark.ray, pytest.mark.slow_on_postgres]

PROMPT = "1 a"
TOKENS = 12
# A fixed precision: with `auto` the two runs could measure different precisions as faster, and they must agree.
MODEL = SPEC | {"training": SPEC["training"] | {"precision": "fp32"}}


@dataclass
class Streams:
    """A client that requests streams without pause and records the fingerprints and the text of each."""

    client: OpenAI
    seen: list[tuple[frozenset[str | None], str]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)

    def __enter__(self) -> "Streams":
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._ask_until_stopped)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _ask_until_stopped(self) -> None:
        while not self._stopping.wait(0.2):
            try:
                chunks = list(
                    self.client.completions.create(
                        model="m", prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True
                    )
                )
            except openai.APIError as error:
                self.failures.append(error)
                continue
            fingerprints = frozenset(chunk.system_fingerprint for chunk in chunks)
            self.seen.append((fingerprints, "".join(chunk.choices[0].text for chunk in chunks)))


@pytest.fixture
def serving(ray_cluster: RayCluster, new_plane: NewPlane) -> Iterator[tuple[ControlPlane, RayServing]]:
    plane = new_plane()
    [port] = free_ports(1)
    serving = RayServing(plane.settings.artifacts, "127.0.0.1", port)
    yield plane, serving
    serving.close()
    serve.shutdown()


def test_an_update_over_ray_is_served_to_openai_clients_and_equals_one_without_ray(
    ray_cluster: RayCluster,
    serving: tuple[ControlPlane, RayServing],
    new_plane: NewPlane,
    workers: Workers,
    tmp_path: Path,
) -> None:
    plane, over_serve = serving
    over_ray = RayExecutor(open_artifacts(plane.settings.artifacts), ray_cluster.dashboard_url)
    plane.client.create_model(MODEL)
    with OpenAI(base_url=f"{over_serve.url()}/v1", api_key="unused", max_retries=0) as client:
        first = push_and_release(plane, 1, over_ray, over_serve)
        assert [model.id for model in client.models.list()] == ["m", "m@1"]
        with Streams(client) as streams:
            second = push_and_release(plane, 2, over_ray, over_serve)
            chat = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])
            until(lambda: any("m@2" in fingerprints for fingerprints, _ in streams.seen))
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt=PROMPT)
    assert (first.number, second.number) == (1, 2)
    assert chat.system_fingerprint == "m@2"
    assert not streams.failures
    assert set(streams.seen) == {
        (frozenset({f"m@{version.number}"}), greedy(folder, PROMPT, TOKENS))
        for version in (first, second)
        for folder in [download(plane, version, tmp_path / f"export-{version.number}")]
    }
    [update, *_] = plane.client.updates("m")
    assert [stage.reused for stage in update.stages] == [False] * len(update.stages)
    for stage in update.stages:
        if stage.kind.startswith("train"):
            assert stage.progress is not None
            assert len(plane.client.metrics(update.id, stage.id)) == stage.progress.total_steps

    other = new_plane()
    alone, local = workers(other)
    other.client.create_model(MODEL)
    for version in (first, second):
        without_ray = push_and_release(other, version.number, alone, local)
        assert without_ray.artifact.sha256 == version.artifact.sha256
        assert without_ray.evaluations == version.evaluations


@pytest.mark.slow
def test_every_paradigm_over_ray_is_served_and_equals_the_one_without_ray(
    ray_cluster: RayCluster,
    serving: tuple[ControlPlane, RayServing],
    new_plane: NewPlane,
    workers: Workers,
) -> None:
    plane, over_serve = serving
    over_ray = RayExecutor(open_artifacts(plane.settings.artifacts), ray_cluster.dashboard_url)
    other = new_plane()
    alone, local = workers(other)
    names = [name.replace("_", "-") for name in PARADIGMS]
    for name, paradigm in zip(names, PARADIGMS, strict=True):
        spec = MODEL | {"name": name, "paradigm": {"name": paradigm}}
        plane.client.create_model(spec)
        other.client.create_model(spec)
    with OpenAI(base_url=f"{over_serve.url()}/v1", api_key="unused", max_retries=0) as client:
        for number in (1, 2):
            for each in (plane, other):
                each.push(DATASET, *texts_of(number, DOCUMENTS)).raise_for_status()
            for name in names:
                version = released(plane, over_ray, over_serve, name)
                without_ray = released(other, alone, local, name)
                assert version.number == without_ray.number == number
                assert version.artifact.sha256 == without_ray.artifact.sha256, name
                assert version.evaluations == without_ray.evaluations
                answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=2)
                assert answer.system_fingerprint == f"{name}@{number}"
        listed = {model.id for model in client.models.list()}
        assert {id.partition("@")[0] for id in listed} == set(names)
        assert {*names, *(f"{name}@2" for name in names)} <= listed
