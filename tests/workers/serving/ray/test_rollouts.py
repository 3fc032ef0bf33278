"""Rollouts by Serve: it replaces replicas one by one, scales with the load, and stops idle ones."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from ray import serve

from service.artifacts import LocalArtifacts
from service.core.errors import Unavailable
from service.core.serving import ReplicaReport, ServedTarget
from service.core.serving_specs import ReplicasSpec, RollingSpec, ServingSpec
from tests.support.ports import free_ports
from tests.support.ray_cluster import RayCluster
from tests.support.tiny_export import publish_tiny_export
from tests.support.waiting import until
from tests.workers.serving.serving_line import failures, line
from workers.serving.ray.serving import RayServing

pytestmark = [pytest.mark.ray, pytest.mark.guard]

BODY = {"model": "line", "prompt": "The cat sat on", "max_tokens": 20, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the artifacts."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def serving(ray_cluster: RayCluster, folder: Path) -> Iterator[RayServing]:
    artifacts = LocalArtifacts(folder)
    for number in (1, 2):
        publish_tiny_export(artifacts, f"export/{number}", seed=number)
    publish_tiny_export(artifacts, "export/broken", seed=3, broken=True)
    [port] = free_ports(1)
    serving = RayServing(artifacts.url, "127.0.0.1", port)
    yield serving
    serving.close()
    serve.shutdown()


def reports(serving: RayServing, target: ServedTarget) -> Sequence[ReplicaReport]:
    try:
        serving.apply([target])
    except Unavailable:
        return ()
    return serving.observe(["line"])["line"]


def complete(serving: RayServing) -> httpx.Response:
    return httpx.post(f"{serving.url()}/v1/completions", json=BODY, timeout=60)


class Clients:
    """Send requests without pause, and record the versions that answered and the rejections."""

    def __init__(self, serving: RayServing, num_clients: int) -> None:
        self._serving = serving
        self._stop = threading.Event()
        self.versions: list[str] = []
        self.rejections: list[str] = []
        self._threads = [threading.Thread(target=self._send) for _ in range(num_clients)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _send(self) -> None:
        while not self._stop.is_set():
            response = complete(self._serving)
            if response.status_code == 200:
                self.versions.append(response.headers["x-pathswitch-version"])
            else:
                self.rejections.append(response.text)


def test_rolling_replaces_replicas_one_by_one_under_load_and_keeps_them_if_the_next_version_is_broken(
    serving: RayServing,
) -> None:
    spec = ServingSpec(rollout=RollingSpec(), replicas=ReplicasSpec(min=2, max=2))
    first = replace(line(1), rolling=True, spec=spec)
    until(lambda: [report.number for report in reports(serving, first)] == [1, 1])
    before = {report.replica for report in reports(serving, first)}
    second = replace(line(2, sequence=1), rolling=True, spec=spec)
    with Clients(serving, 4) as clients:
        until(lambda: [report.number for report in reports(serving, second)] == [2, 2])
    assert not clients.rejections
    assert set(clients.versions) == {"1", "2"}
    after = {report.replica for report in reports(serving, second)}
    assert not before & after
    # Other changes of the target do not replace the replicas.
    live = replace(second, awake=False, proven=True, spec=spec.model_copy(update={"keep": 3}))
    for _ in range(10):
        # A replica that takes its new target may be silent for a moment, and is then reported under a placeholder.
        answering = {report.replica for report in reports(serving, live) if report.number is not None}
        assert answering <= after
        time.sleep(0.5)
    until(lambda: {report.replica for report in reports(serving, live)} == after)

    broken = replace(line(3, "export/broken", sequence=2), rolling=True, spec=spec)
    with Clients(serving, 2) as clients:
        until(
            lambda: any(
                "not finite" in (failures(report).get(3) or "") for report in reports(serving, broken)
            )
        )
    assert not clients.rejections
    assert set(clients.versions) == {"2"}
    back = replace(line(2, sequence=3), rolling=True, spec=spec)
    until(lambda: [report.number for report in reports(serving, back)] == [2, 2])


def test_a_replica_that_cannot_load_the_served_version_gets_no_requests(
    serving: RayServing, folder: Path
) -> None:
    one = replace(line(1, sequence=4), proven=True)
    until(lambda: [report.number for report in reports(serving, one)] == [1])
    export, hidden = folder / "export" / "1", folder / "hidden"
    export.rename(hidden)
    two = replace(one, spec=ServingSpec(replicas=ReplicasSpec(min=2, max=2)))
    with Clients(serving, 2) as clients:
        until(lambda: [(r.number, r.starting) for r in reports(serving, two)] == [(1, False), (None, True)])
        time.sleep(20)  # enough for it to start and fail
        assert [(r.number, r.starting) for r in reports(serving, two)] == [(1, False), (None, True)]
        hidden.rename(export)
        until(lambda: [report.number for report in reports(serving, two)] == [1, 1], seconds=120)
    assert not clients.rejections


def test_an_idle_line_sleeps_wakes_up_for_a_request_and_scales_with_the_load(
    serving: RayServing,
) -> None:
    spec = ServingSpec(replicas=ReplicasSpec(min=0, max=2, requests=0.2, idle_seconds=5))
    awake = replace(line(1, sequence=5), spec=spec)
    until(lambda: {report.number for report in reports(serving, awake)} == {1})
    asleep = replace(awake, awake=False)
    until(lambda: list(reports(serving, asleep)) == [])
    listed = httpx.get(f"{serving.url()}/v1/models").json()["data"]
    assert [(model["id"], model["version"]) for model in listed] == [("line", None)]
    began = time.monotonic()
    response = complete(serving)
    assert (response.status_code, response.headers["x-pathswitch-version"]) == (200, "1")
    assert time.monotonic() - began < 60
    with Clients(serving, 8) as clients:
        until(lambda: [report.number for report in reports(serving, asleep)] == [1, 1])
    assert not clients.rejections
    until(lambda: list(reports(serving, asleep)) == [])
