"""The engine on vLLM answers like the one on transformers, request by request."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_export import CONTEXT_LENGTH
from tests.workers.serving.engine.engine_client import (
    finish,
    raws,
    run,
    sequence,
    text,
    tokens,
)
from tests.workers.serving.engine.vllm.vllm_engines import (
    OPEN_SOCKETS,
    OPTIONS,
    PROMPTS,
    assert_alike,
    close,
)
from workers.serving.engine.batching.transformers_engine import TransformersEngine
from workers.serving.engine.vllm.engine import VllmEngine
from workers.serving.generation import FinishReason

pytestmark = OPEN_SOCKETS


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_logprobs": 0},
        {"num_logprobs": 3},
        {"echo": True},
        {"echo": True, "num_logprobs": 0},
        {"echo": True, "num_logprobs": 3},
        {"max_tokens": 0},
        {"max_tokens": 0, "echo": True},
        {"max_tokens": 0, "echo": True, "num_logprobs": 3},
        {"max_tokens": 1},
        {"max_tokens": 100},
        {"top_p": 0.0, "temperature": 2.0},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5, "max_tokens": 40},
        {"logit_bias": ((70, 8.0), (71, -100.0))},
        {"num_logprobs": 2, "logit_bias": ((70, 100.0),)},
    ],
    ids=str,
)
def test_greedy_answers_are_the_same_events(
    engine: VllmEngine, reference: TransformersEngine, options: dict[str, Any]
) -> None:
    prompts = [engine.encode(prompt) for prompt in PROMPTS]
    assert prompts == [reference.encode(prompt) for prompt in PROMPTS]
    requests = [sequence(prompt, index=index, **options) for index, prompt in enumerate(prompts)]
    for ours, theirs in zip(run(engine, *requests), run(reference, *requests), strict=True):
        assert_alike(ours, theirs)


def test_a_prompt_that_fills_the_context_is_scored_to_its_last_token(
    engine: VllmEngine, reference: TransformersEngine
) -> None:
    prompt = (engine.encode(PROMPTS[0]) * CONTEXT_LENGTH)[:CONTEXT_LENGTH]
    request = sequence(prompt, max_tokens=0, echo=True, num_logprobs=2)
    [[ours], [theirs]] = run(engine, request), run(reference, request)
    assert_alike(ours, theirs)
    assert len(tokens(ours)) == CONTEXT_LENGTH == engine.context_length == reference.context_length


@pytest.mark.parametrize("begin", [0, 3, 5, 8])
def test_a_stop_string_ends_the_answer_before_it(
    engine: VllmEngine, reference: TransformersEngine, begin: int
) -> None:
    prompt = engine.encode(PROMPTS[0])
    [whole] = run(engine, sequence(prompt, max_tokens=60))
    request = sequence(prompt, max_tokens=60, stop=(text(whole)[begin : begin + 3], "nowhere"))
    [[ours], [theirs]] = run(engine, request), run(reference, request)
    assert_alike(ours, theirs)
    assert finish(ours).reason is FinishReason.STOP
    [after] = run(engine, sequence(prompt, max_tokens=60))
    assert_alike(after, whole)


def test_the_end_token_ends_the_answer_and_is_counted_but_not_shown(
    folder: Path, tmp_path: Path, vllm: str
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    ends = [*range(0, 300, 7), 999_999]  # the last is outside the vocabulary
    (tmp_path / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    ours, theirs = VllmEngine(tmp_path, OPTIONS), TransformersEngine(tmp_path)
    requests = [
        sequence(ours.encode(prompt), max_tokens=100, index=index) for index, prompt in enumerate(PROMPTS)
    ]
    answers = run(ours, *requests)
    for one, other in zip(answers, run(theirs, *requests), strict=True):
        assert_alike(one, other)
    assert FinishReason.STOP in {finish(answer).reason for answer in answers}
    close(ours)
    theirs.close()


def test_a_seed_gives_the_same_answer_alone_and_beside_others(engine: VllmEngine) -> None:
    prompt, large = engine.encode(PROMPTS[0]), (1 << 64) - 1  # seeds have 64 bits, without a sign
    [alone] = run(engine, sequence(prompt, temperature=1.0, top_p=0.9, seed=large))
    crowd = [
        sequence(prompt, temperature=1.0, top_p=0.9, seed=large - index, index=index) for index in range(6)
    ]
    answers = run(engine, *crowd)
    assert raws(answers[0]) == raws(alone)
    assert len({tuple(raws(answer)) for answer in answers}) == 6


def test_sampling_parameters_reach_the_sampler(
    fake_vllm: None, folder: Path, reference: TransformersEngine
) -> None:
    """The stand-in samples as the transformers engine does: equal parameters give equal tokens."""
    engine = VllmEngine(folder, OPTIONS)
    requests = [
        sequence(
            engine.encode(prompt),
            temperature=0.5 + index / 2,
            top_p=1.0 - index / 10,
            seed=7 + index,
            index=index,
            num_logprobs=2,
            frequency_penalty=index / 4,
        )
        for index, prompt in enumerate(PROMPTS[:4])
    ]
    for ours, theirs in zip(run(engine, *requests), run(reference, *requests), strict=True):
        assert_alike(ours, theirs)
    close(engine)
