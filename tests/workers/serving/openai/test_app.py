"""Completions and chats over real HTTP with the real client."""

import time
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import CompletionChoice

from tests.workers.serving.serving_line import PROMPT


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["line", "line@1"]
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
    whole = client.completions.create(model="line", prompt=PROMPT, temperature=0, max_tokens=100)
    chunks = list(
        client.completions.create(
            model="line",
            prompt=PROMPT,
            temperature=0,
            max_tokens=100,
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
    assert len(chunks) > 2, "the answer came as one chunk"


def test_a_stream_comes_token_by_token(http: httpx.Client) -> None:
    # With many choices: this small model may finish a single one before its second batch is due.
    body = {"model": "line", "prompt": PROMPT, "max_tokens": 100, "temperature": 0, "n": 48, "stream": True}
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


@pytest.mark.parametrize("options", [{}, {"logprobs": 2}, {"echo": True}, {"echo": True, "logprobs": 0}])
def test_best_of_returns_the_candidates_that_are_likeliest_per_token(
    client: OpenAI, options: dict[str, Any]
) -> None:
    prompts, n, best_of = [PROMPT, "the dog"], 2, 6
    request: dict[str, Any] = {"model": "line", "prompt": prompts, "seed": 3, "max_tokens": 12, "stop": "a"}
    candidates = client.completions.create(**request, **{"logprobs": 0, **options}, n=best_of)
    answer = client.completions.create(**request, **options, n=n, best_of=best_of)

    def sampled(choice: CompletionChoice) -> list[float]:
        echoed = len(prompts[choice.index // best_of]) if "echo" in options else 0
        logprobs: Any = choice.logprobs
        return [
            p for p, at in zip(logprobs.token_logprobs, logprobs.text_offset, strict=True) if at >= echoed
        ]

    def mean(choice: CompletionChoice) -> float:
        return sum(sampled(choice)) / len(sampled(choice))

    expected: list[CompletionChoice] = []
    for first in (0, best_of):
        of_prompt = candidates.choices[first : first + best_of]
        expected += sorted(of_prompt, key=mean, reverse=True)[:n]
        # Candidates differ in length, so the likeliest per token need not be the likeliest as a whole.
        assert len({len(sampled(choice)) for choice in of_prompt}) > 1
    assert max(candidates.choices[:best_of], key=lambda choice: sum(sampled(choice))) != expected[0]
    assert expected[0].index > 0
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [choice.text for choice in expected]
    assert [choice.finish_reason for choice in answer.choices] == [
        choice.finish_reason for choice in expected
    ]
    for choice, candidate in zip(answer.choices, expected, strict=True):
        if "logprobs" not in options:
            assert choice.logprobs is None
            continue
        own: Any = choice.logprobs
        expected_logprobs: Any = candidate.logprobs
        assert (own.tokens, own.text_offset) == (expected_logprobs.tokens, expected_logprobs.text_offset)
        # The last bits depend on which other sequences share a step, and on their slots.
        assert own.token_logprobs == pytest.approx(expected_logprobs.token_logprobs, abs=1e-4)
    assert answer.usage == candidates.usage


def test_echoed_prompts_carry_the_logprobs_that_an_evaluation_harness_needs(client: OpenAI) -> None:
    """Send the request with which lm-evaluation-harness scores a continuation, and check what it reads."""
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
    token_logprobs: list[Any] = logprobs.token_logprobs
    assert token_logprobs[0] is None
    scored = token_logprobs[len(context) : -1]
    best = [max(top.values()) for top in logprobs.top_logprobs[len(context) : -1]]
    assert all(value < 0 for value in scored)
    assert all(value <= highest for value, highest in zip(scored, best, strict=True))
    # The next token was chosen greedily, so it is the best one.
    assert token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())
    scoring_only = client.completions.create(
        model="line", prompt=[context + continuation], max_tokens=0, logprobs=0, echo=True
    )
    assert scoring_only.choices[0].logprobs is not None
    assert scoring_only.choices[0].logprobs.token_logprobs == token_logprobs[:-1]
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


def test_chat_does_not_add_the_chosen_token_to_its_alternatives(client: OpenAI) -> None:
    """Completions do."""
    unlikely: dict[str, Any] = {"temperature": 2.0, "max_tokens": 20, "seed": 3}
    chat = client.chat.completions.create(
        model="line", messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=1, **unlikely
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert any(token.token != token.top_logprobs[0].token for token in content)
    assert {len(token.top_logprobs) for token in content} == {1}
    completion = client.completions.create(model="line", prompt="Hi", logprobs=1, **unlikely)
    assert completion.choices[0].logprobs is not None
    assert {len(top or ()) for top in completion.choices[0].logprobs.top_logprobs or ()} == {1, 2}


def test_an_answer_can_be_sent_back_as_a_message(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    for _ in range(2):
        answer = client.chat.completions.create(model="line", messages=messages, max_tokens=3)
        assert answer.choices[0].message.content is not None
        messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]


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
