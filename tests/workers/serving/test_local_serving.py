"""The OpenAI interface over real HTTP, with the real client."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from service.artifacts import Artifacts
from service.core.serving import ReplicaReport, ServedTarget
from tests.support.tiny_export import publish_tiny_export
from workers.serving.local_serving import LocalServing

PROMPT = "The cat sat on"
LINE = ServedTarget("line", 1, "export/1")
UNRELEASED = ServedTarget("unreleased", None, None)


def settle(serving: LocalServing, *targets: ServedTarget) -> None:
    serving.apply(targets)
    deadline = time.monotonic() + 30
    while any(serving.observe()[target.model][0].number != target.number for target in targets):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    artifacts = Artifacts(tmp_path_factory.mktemp("artifacts"))
    for number in (1, 2):
        publish_tiny_export(artifacts, f"export/{number}", seed=number)
    publish_tiny_export(artifacts, "export/broken", seed=3, broken=True)
    return artifacts


@pytest.fixture(scope="module")
def serving(artifacts: Artifacts) -> Iterator[LocalServing]:
    serving = LocalServing(artifacts, "127.0.0.1", 0)
    settle(serving, LINE, UNRELEASED)
    yield serving
    serving.close()


@pytest.fixture(scope="module")
def client(serving: LocalServing) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{serving.url()}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(serving: LocalServing) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=serving.url(), timeout=30) as http:
        yield http


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["line"]
    assert client.models.retrieve("line").owned_by == "pathswitch"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion_names_its_version(client: OpenAI) -> None:
    raw = client.completions.with_raw_response.create(model="line", prompt=PROMPT, temperature=0)
    assert raw.headers["x-pathswitch-version"] == "1"
    completion = raw.parse()
    assert completion.system_fingerprint == "line@1"
    assert completion.object == "text_completion"
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 16
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].logprobs is None


def test_a_stream_adds_up_to_the_answer_and_names_its_version_throughout(client: OpenAI) -> None:
    whole = client.completions.create(model="line", prompt=PROMPT, temperature=0, max_tokens=40)
    chunks = list(
        client.completions.create(
            model="line",
            prompt=PROMPT,
            temperature=0,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert {chunk.system_fingerprint for chunk in chunks} == {"line@1"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]].count("length") == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 5


def test_a_stream_comes_token_by_token(http: httpx.Client) -> None:
    body = {"model": "line", "prompt": PROMPT, "max_tokens": 100, "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-pathswitch-version"] == "1"
        arrivals = [(time.monotonic(), line) for line in response.iter_lines() if line]
    assert arrivals[-1][1] == "data: [DONE]"
    assert arrivals[-1][0] - arrivals[0][0] > 0.05


def test_prompts_may_be_strings_or_token_ids_one_or_many(client: OpenAI) -> None:
    def texts(prompt: Any, **options: Any) -> list[str]:
        answer = client.completions.create(model="line", prompt=prompt, temperature=0, **options)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    one, other = texts("ab"), texts("cd")
    assert texts(["ab", "cd"]) == one + other
    ids = [[ord("a") - 32, ord("b") - 32], [ord("c") - 32, ord("d") - 32]]
    echoed = texts(ids, echo=True)
    assert echoed == ["ab" + one[0], "cd" + other[0]]
    assert texts(ids[0]) == one
    assert texts(ids, n=2) == [one[0]] * 2 + [other[0]] * 2


def test_seeds_repeat_an_answer(client: OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        answer = client.completions.create(model="line", prompt=PROMPT, seed=seed, n=3, max_tokens=12)
        return [choice.text for choice in answer.choices]

    assert texts(1) == texts(1)
    assert texts(1) != texts(-2)
    assert len(set(texts(1))) == 3


def test_echoed_prompts_carry_the_logprobs_a_harness_needs(client: OpenAI) -> None:
    """The request lm-evaluation-harness sends to score a continuation, and what it reads of the answer."""
    context, continuation = [34, 35, 36], [37, 38]
    answer = client.completions.create(
        model="line",
        prompt=[context + continuation],
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    assert logprobs.token_logprobs[0] is None
    scored = logprobs.token_logprobs[len(context) : -1]
    best = [max(top.values()) for top in logprobs.top_logprobs[len(context) : -1]]
    assert all(value < 0 for value in scored)
    assert all(value <= highest for value, highest in zip(scored, best, strict=True))
    # The next token was chosen greedily, so it is its row's best.
    assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())
    scoring_only = client.completions.create(
        model="line", prompt=[context + continuation], max_tokens=0, logprobs=0, echo=True
    )
    assert scoring_only.choices[0].logprobs is not None
    assert scoring_only.choices[0].logprobs.token_logprobs == logprobs.token_logprobs[:-1]
    assert scoring_only.usage is not None
    assert scoring_only.usage.completion_tokens == 0


def test_chat_with_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="line",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        max_completion_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert answer.system_fingerprint == "line@1"
    assert answer.choices[0].message.role == "assistant"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    assert all(len(token.top_logprobs) == 2 for token in logprobs.content)
    joined = b"".join(bytes(token.bytes or []) for token in logprobs.content)
    assert joined.decode(errors="replace") == answer.choices[0].message.content


def test_chat_streams(client: OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "line",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 12,
        "temperature": 0,
        "n": 2,
    }
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert {chunk.system_fingerprint for chunk in chunks} == {"line@1"}
    assert chunks[0].choices[0].delta.role == "assistant"
    for index in range(2):
        own = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in own) == whole.choices[index].message.content
        assert own[-1].finish_reason == whole.choices[index].finish_reason


def test_unknown_models_are_404_and_unreleased_ones_503(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt=PROMPT)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError) as unreleased:
        client.completions.create(model="unreleased", prompt=PROMPT, stream=True)
    assert unreleased.value.status_code == 503
    assert unreleased.value.code == "model_not_ready"
    assert int(unreleased.value.response.headers["retry-after"]) > 0


COMPLETION = {"model": "line", "prompt": "a", "max_tokens": 1}
CHAT = {"model": "line", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "a"}, "model"),
        ("completions", {**COMPLETION, "prompt": []}, "prompt"),
        ("completions", {**COMPLETION, "prompt": [1.5]}, "prompt"),
        ("completions", {**COMPLETION, "prompt": [100_000]}, "prompt"),
        ("completions", {**COMPLETION, "max_tokens": 1000}, "prompt"),
        ("completions", {**COMPLETION, "temperature": -1}, "temperature"),
        ("completions", {**COMPLETION, "temperature": "hot"}, "temperature"),
        ("completions", {**COMPLETION, "n": 0}, "n"),
        ("completions", {**COMPLETION, "logprobs": 21}, "logprobs"),
        ("completions", {**COMPLETION, "stop": [""]}, "stop"),
        ("completions", {**COMPLETION, "best_of": 4}, "best_of"),
        ("completions", {**COMPLETION, "suffix": "end"}, "suffix"),
        ("completions", {**COMPLETION, "presence_penalty": 0.5}, "presence_penalty"),
        ("completions", {**COMPLETION, "logit_bias": {"5": 1}}, "logit_bias"),
        ("completions", {**COMPLETION, "top_k": 5}, "top_k"),
        ("completions", {**COMPLETION, "stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {**CHAT, "messages": []}, "messages"),
        ("chat/completions", {**CHAT, "messages": [{"role": "tool", "content": "a"}]}, "messages"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {**CHAT, "top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {**CHAT, "reasoning_effort": "low"}, "reasoning_effort"),
        ("chat/completions", {**CHAT, "max_tokens": 1000}, "messages"),
    ],
)
def test_invalid_requests_are_400_and_name_the_parameter(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    response = http.post(f"/v1/{path}", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("completions", {"user": "u", "presence_penalty": 0, "best_of": 1, "logit_bias": {}, "seed": None}),
        ("chat/completions", {"store": False, "metadata": {"a": "b"}, "response_format": {"type": "text"}}),
        ("chat/completions", {"tools": [], "tool_choice": "none", "service_tier": "auto"}),
    ],
)
def test_parameters_that_change_nothing_are_accepted(
    http: httpx.Client, path: str, extra: dict[str, Any]
) -> None:
    body = COMPLETION if path == "completions" else CHAT
    assert http.post(f"/v1/{path}", json={**body, **extra}).status_code == 200


def test_errors_of_routing_and_parsing_have_the_same_shape(http: httpx.Client) -> None:
    malformed = http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    for response, status in (
        (malformed, 400),
        (http.get("/v1/nothing"), 404),
        (http.get("/v1/completions"), 405),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_too_many_waiting_sequences_are_429(http: httpx.Client, client: OpenAI) -> None:
    body = {"model": "line", "prompt": ["a"] * 512, "max_tokens": 100, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as busy:
        lines = busy.iter_lines()  # kept, since a discarded iterator closes the connection
        next(lines)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="line", prompt=["a"] * 512, max_tokens=1)
    assert refused.value.code == "rate_limit_exceeded"
    assert refused.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_the_decoding(http: httpx.Client, stream: bool) -> None:
    """512 sequences of 120 tokens would take many seconds; the next request is answered long before."""
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


def test_a_swap_under_clients_fails_nothing_and_mixes_nothing(artifacts: Artifacts) -> None:
    serving = LocalServing(artifacts, "127.0.0.1", 0)
    settle(serving, LINE)
    stop = threading.Event()
    seen: list[tuple[str, str]] = []
    failures: list[str] = []

    def stream_until_stopped() -> None:
        body = {"model": "line", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "stream": True}
        with httpx.Client(base_url=serving.url(), timeout=30) as http:
            while not stop.is_set():
                with http.stream("POST", "/v1/completions", json=body) as response:
                    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
                chunks = [json.loads(line) for line in lines[:-1]]
                fingerprints = {chunk["system_fingerprint"] for chunk in chunks}
                if response.status_code != 200 or lines[-1] != "[DONE]" or len(fingerprints) != 1:
                    failures.append(str(lines))
                version = response.headers["x-pathswitch-version"]
                assert fingerprints == {f"line@{version}"}
                seen.append((version, "".join(chunk["choices"][0]["text"] for chunk in chunks)))

    clients = [threading.Thread(target=stream_until_stopped) for _ in range(4)]
    for thread in clients:
        thread.start()
    time.sleep(0.5)
    settle(serving, ServedTarget("line", 2, "export/2"))
    serving.apply([ServedTarget("line", 3, "export/broken")])
    time.sleep(0.5)
    stop.set()
    for thread in clients:
        thread.join()
    [report] = serving.observe()["line"]
    serving.close()
    assert not failures
    assert len(set(seen)) == 2  # one text a version
    assert {version for version, _ in seen} == {"1", "2"}
    assert (report.number, report.failed_number) == (2, 3)


def test_models_that_are_no_target_any_more_are_gone(artifacts: Artifacts) -> None:
    serving = LocalServing(artifacts, "127.0.0.1", 0)
    settle(serving, LINE)
    serving.apply([UNRELEASED])
    assert serving.observe() == {"unreleased": [ReplicaReport("unreleased-0", None)]}
    response = httpx.post(f"{serving.url()}/v1/completions", json=COMPLETION)
    assert response.status_code == 404
    serving.close()


def test_a_port_in_use_is_the_callers_error(serving: LocalServing, artifacts: Artifacts) -> None:
    port = int(serving.url().rpartition(":")[2])
    with pytest.raises(OSError, match="in use"):
        LocalServing(artifacts, "127.0.0.1", port)
