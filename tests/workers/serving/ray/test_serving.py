"""Real Ray Serve under load: releases, swaps, failures and recovery."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.schema import ServeDeploySchema

from service.artifacts import Artifacts, LocalArtifacts
from service.core.errors import Unavailable
from service.core.serving import ServedTarget
from tests.support.engines import engine_pids
from tests.support.ports import free_ports
from tests.support.ray_cluster import RayCluster
from tests.support.tiny_export import publish_tiny_export
from tests.support.waiting import until
from tests.workers.serving.serving_line import failures, line, trying, version
from workers.serving.ray.declaration import ReplicaOptions, applications, differing
from workers.serving.ray.serving import RayServing

pytestmark = pytest.mark.ray

PROMPT = "The cat sat on"
ANSWER = {"model": "line", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
NUM_CLIENTS = 8


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    artifacts = LocalArtifacts(tmp_path_factory.mktemp("artifacts"))
    for number in (1, 2):
        publish_tiny_export(artifacts, f"export/{number}", seed=number)
    publish_tiny_export(artifacts, "export/broken", seed=3, broken=True)
    return artifacts


@pytest.fixture(scope="module")
def serving(ray_cluster: RayCluster, artifacts: Artifacts) -> Iterator[RayServing]:
    [port] = free_ports(1)
    serving = RayServing(artifacts.url, "127.0.0.1", port)
    yield serving
    serving.close()
    serve.shutdown()


def applied(serving: RayServing, *targets: ServedTarget) -> bool:
    try:
        serving.apply(targets)
    except Unavailable:
        return False
    return True


def release(serving: RayServing, wanted: ServedTarget) -> None:
    """Tick as the orchestrator does until every replica answers with the version and wants no other.

    Until a replica receives the target, an earlier trial may still take a share of its requests.
    """
    assert wanted.stable is not None
    number = wanted.stable.number

    def released() -> bool:
        reports = serving.observe([wanted.model]).get(wanted.model, ()) if applied(serving, wanted) else ()
        return bool(reports) and all(
            report.number == number and {version.number for version in report.versions} == {number}
            for report in reports
        )

    until(released)


def complete(serving: RayServing, **changes: Any) -> httpx.Response:
    return httpx.post(f"{serving.url()}/v1/completions", json={**ANSWER, **changes}, timeout=60)


@dataclass
class Clients:
    """Clients that send requests without pause, every second one for streams, and record the answers."""

    url: str
    stopping: threading.Event = field(default_factory=threading.Event)
    seen: list[tuple[str, str]] = field(default_factory=list)  # version and text
    seconds: list[tuple[float, float]] = field(default_factory=list)  # when asked, how long it took
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> "Clients":
        self._threads = [
            threading.Thread(target=self._ask_until_stopped, args=(number % 2 == 0,))
            for number in range(NUM_CLIENTS)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for thread in self._threads:
            thread.join()

    def _ask_until_stopped(self, stream: bool) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self.stopping.is_set():
                began = time.monotonic()
                try:
                    self._ask(http, stream)
                except (httpx.HTTPError, KeyError, AssertionError, ValueError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                self.seconds.append((began, time.monotonic() - began))

    def _ask(self, http: httpx.Client, stream: bool) -> None:
        response = http.post("/v1/completions", json={**ANSWER, "stream": stream})
        assert response.status_code == 200, response.text
        if stream:
            lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
            assert lines.pop() == "[DONE]"
            answers: list[Mapping[str, Any]] = [json.loads(line) for line in lines]
        else:
            answers = [response.json()]
        version = response.headers["x-pathswitch-version"]
        assert {answer["system_fingerprint"] for answer in answers} == {f"line@{version}"}
        self.seen.append((version, "".join(answer["choices"][0]["text"] for answer in answers)))


def test_before_a_release_it_answers_503(serving: RayServing) -> None:
    until(lambda: applied(serving, ServedTarget("line", None)))
    response = complete(serving)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_not_ready"
    assert complete(serving, model="other").status_code == 404
    assert httpx.get(f"{serving.url()}/v1/models").json()["data"] == []
    assert serving.observe(["line"]) == {"line": []}


def test_a_swap_under_load_fails_no_request_and_mixes_no_versions(serving: RayServing) -> None:
    release(serving, line(1))
    assert complete(serving).headers["x-pathswitch-version"] == "1"
    [replica] = serving.observe(["line"])["line"]
    with Clients(serving.url()) as clients:
        time.sleep(3)
        release(serving, line(2))
        time.sleep(2)
        release(serving, line(1))
        time.sleep(1)
    assert not clients.failures
    assert {version for version, _ in clients.seen} == {"1", "2"}
    assert len(set(clients.seen)) == 2  # one text per version
    assert len(clients.seen) > 50
    # The same process as before.
    assert [report.replica for report in serving.observe(["line"])["line"]] == [replica.replica]


def test_calls_without_changes_are_fast_and_redeploy_nothing(
    serving: RayServing, artifacts: Artifacts
) -> None:
    release(serving, line(1))
    deployed = _deployed_at()
    restarted = RayServing(artifacts.url, "127.0.0.1", int(serving.url().rpartition(":")[2]))
    began = time.monotonic()
    for adopting in (serving, restarted):
        adopting.apply([line(1)])
        assert [report.number for report in adopting.observe(["line"])["line"]] == [1]
    assert time.monotonic() - began < 4
    assert _deployed_at() == deployed


def _deployed_at() -> dict[str, float]:
    return {name: app.last_deployed_time_s for name, app in serve.status().applications.items()}


def test_a_version_that_cannot_be_loaded_is_reported_and_the_old_one_goes_on(serving: RayServing) -> None:
    release(serving, line(1))
    broken = trying(1, version(3, "export/broken"))

    def reported() -> bool:
        reports = serving.observe(["line"])["line"] if applied(serving, broken) else ()
        return [(report.number, set(failures(report))) for report in reports] == [(1, {3})]

    until(reported)
    assert complete(serving).headers["x-pathswitch-version"] == "1"
    release(serving, line(1))


def test_canaries_pinned_versions_and_metrics_work_through_the_ingress(serving: RayServing) -> None:
    release(serving, line(1))
    canary = trying(1, version(2), share=0.5)

    def both() -> bool:
        reports = serving.observe(["line"])["line"] if applied(serving, canary) else ()
        return [
            {version.number for version in report.versions if version.state == "ready"} for report in reports
        ] == [{1, 2}]

    until(both)
    answered = {
        user: [complete(serving, user=user, max_tokens=1).headers["x-pathswitch-version"] for _ in range(3)]
        for user in map(str, range(12))
    }
    assert all(len(set(numbers)) == 1 for numbers in answered.values()), answered
    assert {numbers[0] for numbers in answered.values()} == {"1", "2"}
    for number in (1, 2):
        pinned = complete(serving, model=f"line@{number}")
        assert pinned.json()["system_fingerprint"] == f"line@{number}"
        assert pinned.json()["model"] == "line"
    assert complete(serving, model="line@3").status_code == 404
    listed = httpx.get(f"{serving.url()}/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["line", "line@1", "line@2"]
    exposed = httpx.get(f"{serving.url()}/metrics").text
    counted = [
        line for line in exposed.splitlines() if line.startswith("pathswitch_inference_requests_total{")
    ]
    assert sorted('version="2"' in line for line in counted) == [False, True]
    release(serving, line(1))


def test_decoding_stops_when_its_client_disconnects(serving: RayServing, artifacts: Artifacts) -> None:
    release(serving, line(1))
    end_of_text = json.loads((artifacts.open("export/1") / "config.json").read_text())["eos_token_id"]
    body = {**ANSWER, "prompt": ["a"] * 512, "max_tokens": 120, "stream": True}
    body["logit_bias"] = {end_of_text: -100}  # or the request would finish within two seconds
    with httpx.stream("POST", f"{serving.url()}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        assert complete(serving, prompt=["a"] * 512, max_tokens=1).status_code == 429
    began = time.monotonic()
    until(lambda: complete(serving, prompt=["a"] * 400, max_tokens=1).status_code == 200)
    assert time.monotonic() - began < 10


def test_a_dead_engine_is_replaced_in_its_replica_and_only_started_streams_are_cut_off(
    serving: RayServing,
) -> None:
    release(serving, line(1))
    [before] = serving.observe(["line"])["line"]
    with Clients(serving.url()) as clients:
        time.sleep(2)
        [engine] = engine_pids(_replica_pid())
        died = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        until(lambda: engine_pids(_replica_pid()) not in ([], [engine]))
        until(lambda: sum(began > died + 1 for began, _ in clients.seconds) > 20)
    assert len(clients.failures) <= NUM_CLIENTS / 2, clients.failures
    assert len(set(clients.seen)) == 1
    [after] = serving.observe(["line"])["line"]
    assert after.replica == before.replica


def test_before_ray_stops_requests_in_flight_are_answered_and_new_ones_are_rejected(
    serving: RayServing, artifacts: Artifacts
) -> None:
    release(serving, line(1))
    port = int(serving.url().rpartition(":")[2])
    body = {**ANSWER, "prompt": [PROMPT] * 48, "max_tokens": 100, "stream": True}
    ending = threading.Thread(target=RayServing(artifacts.url, "127.0.0.1", port, ends_with_us=True).close)
    with httpx.stream("POST", f"{serving.url()}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        ending.start()
        until(lambda: complete(serving).status_code == 503)
        assert complete(serving).json()["error"]["code"] == "service_stopping"
        assert ending.is_alive(), "it waits for the stream"
        assert [line for line in lines if line][-1] == "data: [DONE]"
    ending.join(10)
    assert not ending.is_alive()
    # The orchestrator stopped but Ray did not: the next orchestrator accepts requests again.
    following = RayServing(artifacts.url, "127.0.0.1", port, ends_with_us=True)
    until(lambda: applied(following, line(1)))
    assert complete(serving).status_code == 200


@pytest.mark.guard
def test_a_dead_replica_is_replaced_and_waiting_requests_are_answered(serving: RayServing) -> None:
    release(serving, line(1))
    [replica] = serving.observe(["line"])["line"]
    os.kill(_replica_pid(), signal.SIGKILL)
    response = complete(serving)
    assert response.status_code == 200
    assert response.headers["x-pathswitch-version"] == "1"
    [successor] = serving.observe(["line"])["line"]
    assert successor.replica != replica.replica


def _replica_pid() -> int:
    details = ray.get(serve.context._get_global_client()._controller.get_serve_instance_details.remote())
    [replica] = details["applications"]["model-line"]["deployments"]["ModelReplica"]["replicas"]
    pid: int = replica["pid"]
    return pid


@pytest.mark.guard
def test_a_frozen_replica_is_replaced(serving: RayServing) -> None:
    release(serving, line(1))
    [before] = serving.observe(["line"])["line"]
    pid = _replica_pid()
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        until(lambda: applied(serving, line(1)) and _another_answers(serving, before.replica))
        assert time.monotonic() - began < 60  # 30 s to notice, plus the start of another replica
        assert complete(serving).status_code == 200
    finally:
        # Ray only asks the process to exit, and a stopped process cannot.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _another_answers(serving: RayServing, replica: str) -> bool:
    return any(
        report.number == 1 and report.replica != replica for report in serving.observe(["line"])["line"]
    )


@pytest.mark.guard
def test_an_application_that_was_changed_by_hand_is_restored(serving: RayServing) -> None:
    release(serving, line(1))
    by_hand = applications([line(2)], ReplicaOptions("file:///elsewhere"))
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    ray.get(controller.apply_config.remote(ServeDeploySchema.model_validate({"applications": by_hand})))
    release(serving, line(1))
    assert complete(serving).headers["x-pathswitch-version"] == "1"


@pytest.mark.guard
def test_applications_that_were_deleted_by_hand_are_restored(serving: RayServing) -> None:
    release(serving, line(1))
    serve.delete("model-line", _blocking=False)
    time.sleep(1)
    release(serving, line(1))
    serve.shutdown()
    release(serving, line(2))
    assert complete(serving).headers["x-pathswitch-version"] == "2"


@pytest.mark.guard
def test_applications_deployed_by_0_2_answer_and_are_replaced_without_failing_a_request(
    serving: RayServing, artifacts: Artifacts
) -> None:
    declared = applications([line(1)], ReplicaOptions(artifacts.url))
    old = [
        {**app, "import_path": app["import_path"].replace("ray.applications", "ray_apps")} for app in declared
    ]
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    ray.get(controller.apply_config.remote(ServeDeploySchema.model_validate({"applications": old})))
    until(lambda: _runs_as_declared(old))
    with Clients(serving.url()) as clients:
        until(lambda: len(clients.seen) > 10)
        serving.apply([line(1)])
        until(lambda: _runs_as_declared(declared))
        num_before = len(clients.seen)
        until(lambda: len(clients.seen) > num_before + 10)
    assert not clients.failures


def _runs_as_declared(declared: list[dict[str, Any]]) -> bool:
    controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    details = ray.get(controller.get_serve_instance_details.remote())
    states = {name: app["status"] for name, app in details["applications"].items()}
    return not differing(declared, details) and set(states.values()) == {"RUNNING"}


def test_a_line_without_a_target_is_removed(serving: RayServing) -> None:
    until(lambda: applied(serving))
    until(lambda: complete(serving).status_code == 404)
    until(lambda: set(serve.status().applications) == {"ingress"})
