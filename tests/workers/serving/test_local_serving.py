"""The serving port without Ray: overload, clients that disconnect, swaps, and lines that come and go."""

import json
import threading
import time

import httpx
import openai
import pytest
from openai import OpenAI

from service.artifacts import Artifacts
from service.core.serving import ReplicaReport
from tests.workers.serving.serving_line import (
    COMPLETION,
    LINE,
    PROMPT,
    UNRELEASED,
    failures,
    line,
    settle,
    trying,
    version,
)
from workers.serving.local_serving import LocalServing


def test_too_many_waiting_sequences_are_429(http: httpx.Client, client: OpenAI) -> None:
    body = {"model": "line", "prompt": ["a"] * 512, "max_tokens": 100, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as busy:
        lines = busy.iter_lines()  # keep a reference: a discarded iterator closes the connection
        next(lines)
        with pytest.raises(openai.RateLimitError) as rejected:
            client.completions.create(model="line", prompt=["a"] * 512, max_tokens=1)
    assert rejected.value.code == "rate_limit_exceeded"
    assert 1 <= int(rejected.value.response.headers["retry-after"]) <= 30


@pytest.mark.parametrize("stream", [True, False])
def test_decoding_stops_when_its_client_disconnects(http: httpx.Client, stream: bool) -> None:
    """512 sequences of 120 tokens would take many seconds, but the next request is answered well before that."""
    body = {"model": "line", "prompt": ["a"] * 512, "max_tokens": 120, "temperature": 0, "stream": stream}
    if stream:
        with http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, timeout=0.5)
    began = time.monotonic()
    while http.post("/v1/completions", json=COMPLETION).status_code == 429:
        time.sleep(0.05)
    assert time.monotonic() - began < 5


def test_a_swap_under_load_fails_no_request_and_mixes_no_versions(artifacts: Artifacts) -> None:
    serving = LocalServing(artifacts, "127.0.0.1", 0)
    settle(serving, LINE)
    stop = threading.Event()
    seen: list[tuple[str, str]] = []
    errors: list[str] = []

    def stream_until_stopped() -> None:
        body = {"model": "line", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "stream": True}
        with httpx.Client(base_url=serving.url(), timeout=30) as http:
            while not stop.is_set():
                with http.stream("POST", "/v1/completions", json=body) as response:
                    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
                chunks = [json.loads(line) for line in lines[:-1]]
                fingerprints = {chunk["system_fingerprint"] for chunk in chunks}
                if response.status_code != 200 or lines[-1] != "[DONE]" or len(fingerprints) != 1:
                    errors.append(str(lines))
                version = response.headers["x-pathswitch-version"]
                assert fingerprints == {f"line@{version}"}
                seen.append((version, "".join(chunk["choices"][0]["text"] for chunk in chunks)))

    clients = [threading.Thread(target=stream_until_stopped) for _ in range(4)]
    for thread in clients:
        thread.start()
    time.sleep(0.5)
    settle(serving, line(2))
    serving.apply([trying(2, version(3, "export/broken"))])
    time.sleep(0.5)
    stop.set()
    for thread in clients:
        thread.join()
    [report] = serving.observe(["line"])["line"]
    serving.close()
    assert not errors
    assert len(set(seen)) == 2  # one text per version
    assert {version for version, _ in seen} == {"1", "2"}
    assert (report.number, set(failures(report))) == (2, {3})


def test_models_without_a_target_are_removed(artifacts: Artifacts) -> None:
    serving = LocalServing(artifacts, "127.0.0.1", 0)
    settle(serving, LINE)
    serving.apply([UNRELEASED])
    assert serving.observe(["line", "unreleased"]) == {"unreleased": [ReplicaReport("unreleased-0", None)]}
    response = httpx.post(f"{serving.url()}/v1/completions", json=COMPLETION)
    assert response.status_code == 404
    serving.close()


def test_the_constructor_raises_if_the_port_is_in_use(serving: LocalServing, artifacts: Artifacts) -> None:
    port = int(serving.url().rpartition(":")[2])
    with pytest.raises(OSError, match="in use"):
        LocalServing(artifacts, "127.0.0.1", port)
