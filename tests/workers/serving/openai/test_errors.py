"""Rejected requests and the shape of their errors."""

import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from prometheus_client import Metric

from tests.workers.serving.serving_line import COMPLETION, PROMPT
from workers.serving.generation import AnswerItem, Generation
from workers.serving.openai.app import build_app
from workers.serving.openai.body_limit import MAX_BODY_BYTES
from workers.serving.openai.directory import ServedModel


def test_unknown_models_are_404_and_unreleased_ones_503(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt=PROMPT)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError) as unreleased:
        client.completions.create(model="unreleased", prompt=PROMPT, stream=True)
    assert unreleased.value.status_code == 503
    assert unreleased.value.code == "model_not_ready"
    assert int(unreleased.value.response.headers["retry-after"]) > 0


def test_a_body_that_is_too_large_is_rejected(http: httpx.Client) -> None:
    fits = {**COMPLETION, "user": "u" * (MAX_BODY_BYTES - 1000)}
    assert http.post("/v1/completions", json=fits).status_code == 200
    answer = http.post("/v1/completions", json={**COMPLETION, "user": "u" * MAX_BODY_BYTES})
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "larger than" in answer.json()["error"]["message"]


AS_JSON = {"content-type": "application/json"}
CHAT: dict[str, Any] = {"model": "line", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}


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
        ("completions", {**COMPLETION, "best_of": 0}, "best_of"),
        ("completions", {**COMPLETION, "n": 3, "best_of": 2}, "best_of"),
        ("completions", {**COMPLETION, "best_of": 2, "stream": True}, "best_of"),
        ("completions", {**COMPLETION, "prompt": ["a"] * 4, "best_of": 129}, "best_of"),
        ("completions", {**COMPLETION, "suffix": "end"}, "suffix"),
        ("completions", {**COMPLETION, "presence_penalty": 2.5}, "presence_penalty"),
        ("completions", {**COMPLETION, "frequency_penalty": -3}, "frequency_penalty"),
        ("completions", {**COMPLETION, "logit_bias": {"5": 101}}, "logit_bias"),
        ("completions", {**COMPLETION, "logit_bias": {"cat": 1}}, "logit_bias"),
        ("completions", {**COMPLETION, "logit_bias": {"9999": 1}}, "logit_bias"),
        ("completions", {**COMPLETION, "top_k": 5}, "top_k"),
        ("completions", {**COMPLETION, "stream_options": {"include_usage": True}}, "stream_options"),
        ("chat/completions", {**CHAT, "messages": []}, "messages"),
        ("chat/completions", {**CHAT, "messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        (
            "chat/completions",
            {**CHAT, "messages": [*CHAT["messages"], {"role": "user"}]},
            "messages[1].content",
        ),
        ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ("completions", {**COMPLETION, "prompt": ["a", "\ud800"]}, "prompt"),
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
    response = http.post(f"/v1/{path}", content=json.dumps(body), headers=AS_JSON)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        ("completions", {"user": "u", "presence_penalty": 0, "best_of": 1, "logit_bias": {}, "seed": None}),
        ("completions", {"n": 2, "best_of": 2, "stream": True}),
        ("chat/completions", {"store": False, "metadata": {"a": "b"}, "response_format": {"type": "text"}}),
        ("chat/completions", {"tools": [], "tool_choice": "none", "service_tier": "auto"}),
        ("chat/completions", {"verbosity": None, "tools": None, "never_heard_of": None}),
        ("completions", {"stream": True, "stream_options": {"include_usage": None}}),
        ("completions", {"user": "\ud800"}),
    ],
)
def test_parameters_that_change_nothing_are_accepted(
    http: httpx.Client, path: str, extra: dict[str, Any]
) -> None:
    body = COMPLETION if path == "completions" else CHAT
    response = http.post(f"/v1/{path}", content=json.dumps({**body, **extra}), headers=AS_JSON)
    assert response.status_code == 200


def test_a_name_with_a_number_beyond_all_versions_is_unknown(http: httpx.Client) -> None:
    for digits in (10, 5000):
        response = http.post("/v1/completions", json={**COMPLETION, "model": f"line@{'9' * digits}"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_a_lone_surrogate_in_a_name_is_replaced_in_the_error(http: httpx.Client) -> None:
    for body, status in (({"model": "\ud800"}, 404), ({"\ud800": 1}, 400)):
        response = http.post("/v1/completions", content=json.dumps(COMPLETION | body), headers=AS_JSON)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_missing_content_type_is_named_in_the_error(http: httpx.Client) -> None:
    response = http.post("/v1/completions", content=json.dumps(COMPLETION))
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


def test_errors_of_routing_and_parsing_have_the_same_shape(http: httpx.Client) -> None:
    malformed = http.post("/v1/completions", content=b"{", headers=AS_JSON)
    for response, status in (
        (malformed, 400),
        (http.get("/v1/nothing"), 404),
        (http.get("/v1/completions"), 405),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_unexpected_errors_have_the_same_shape() -> None:
    class Broken:
        async def served(self) -> dict[str, ServedModel]:
            raise ZeroDivisionError

        async def metrics(self) -> list[Metric]:
            raise ZeroDivisionError

        def generate(self, request: Generation) -> AsyncGenerator[list[AnswerItem], None]:
            raise ZeroDivisionError

    with TestClient(build_app(Broken()), raise_server_exceptions=False) as http:
        for response in (http.get("/v1/models"), http.post("/v1/completions", json=COMPLETION)):
            assert response.status_code == 500
            assert response.json()["error"]["type"] == "server_error"
