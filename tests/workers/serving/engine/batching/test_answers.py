"""The transformers engine answers as transformers' ``generate`` and as the model's own distribution says."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.workers.serving.engine.engine_client import (
    finish,
    raws,
    run,
    sequence,
    text,
    tokens,
)
from workers.serving.engine.batching.transformers_engine import TransformersEngine
from workers.serving.generation import FinishReason, Token

PROMPT = "The cat sat on"


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def engine(export: Path, request: pytest.FixtureRequest) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(export, own_process=request.param)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(export: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(export).eval()


def generated(model: Any, prompt: Sequence[int], max_tokens: int) -> list[int]:
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


def _tokens_of(engine: TransformersEngine, ids: Sequence[int]) -> list[Token]:
    """Token events for the ids, which an echo returns."""
    [events] = run(engine, sequence(ids, max_tokens=0, echo=True))
    return tokens(events)


def _ids(engine: TransformersEngine, answer: Sequence[Token]) -> list[int]:
    by_raw = {token.raw: id for id, token in enumerate(_tokens_of(engine, range(100)))}
    for start in range(100, engine.vocab_size, 100):
        named = _tokens_of(engine, range(start, min(start + 100, engine.vocab_size)))
        by_raw |= {token.raw: start + position for position, token in enumerate(named)}
    return [by_raw[token.raw] for token in answer]


def test_greedy_equals_generate_token_for_token(engine: TransformersEngine, model: Any, export: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export)
    prompts = [engine.encode(prompt) for prompt in (PROMPT, "Grüße", "the dog", "5 €")]
    requests = [sequence(prompt, max_tokens=60, index=index) for index, prompt in enumerate(prompts)]
    for prompt, events in zip(prompts, run(engine, *requests), strict=True):
        expected = generated(model, prompt, 60)
        assert len(tokens(events)) == len(expected) == finish(events).num_tokens
        assert raws(events) == [token.raw for token in _tokens_of(engine, expected)]
        assert text(events) == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_seed_gives_the_same_answer_alone_and_beside_others(engine: TransformersEngine) -> None:
    prompt = engine.encode(PROMPT)
    [alone] = run(engine, sequence(prompt, temperature=1.0, seed=7))
    others = [sequence(prompt, temperature=1.0, seed=7 + index, index=index) for index in range(4)]
    crowd = run(engine, *others)
    assert raws(crowd[0]) == raws(alone)
    assert len({tuple(raws(events)) for events in crowd}) == 4


def test_top_p_zero_is_greedy_at_any_temperature(engine: TransformersEngine) -> None:
    prompt = engine.encode(PROMPT)
    greedy, nucleus = run(
        engine, sequence(prompt, index=0), sequence(prompt, temperature=2.0, top_p=0.0, seed=3, index=1)
    )
    assert raws(nucleus) == raws(greedy)


def test_logprobs_are_those_of_the_model(engine: TransformersEngine, model: Any) -> None:
    prompt = engine.encode(PROMPT)
    [events] = run(engine, sequence(prompt, max_tokens=8, temperature=1.5, seed=5, num_logprobs=3, echo=True))
    answer = tokens(events)
    ids = [*prompt, *_ids(engine, answer[len(prompt) :])]
    with torch.inference_mode():
        logprobs_TV = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
    assert answer[0].logprob is None
    assert answer[0].top is None
    for position, token in enumerate(answer[1:], start=1):
        row_V = logprobs_TV[position - 1]
        assert token.logprob == pytest.approx(float(row_V[ids[position]]), abs=1e-4)
        assert token.top is not None
        best = [alternative.logprob for alternative in token.top[:3]]
        assert best == pytest.approx(row_V.topk(3).values.tolist(), abs=1e-4)
        assert token.raw in {alternative.raw for alternative in token.top}


def test_echo_begins_with_the_prompt_and_offsets_point_into_the_text(engine: TransformersEngine) -> None:
    prompt = "5 € für das"
    [events] = run(engine, sequence(engine.encode(prompt), max_tokens=3, echo=True))
    assert text(events).startswith(prompt)
    for token in tokens(events):
        if token.piece and not token.piece.startswith("bytes:"):
            assert text(events)[token.offset :].startswith(token.piece)


def test_a_stop_string_ends_the_answer_before_it(engine: TransformersEngine) -> None:
    prompt = engine.encode(PROMPT)
    [events] = run(engine, sequence(prompt, max_tokens=40))
    stop = text(events)[5:8]
    [stopped] = run(engine, sequence(prompt, max_tokens=40, stop=(stop,)))
    assert finish(stopped).reason is FinishReason.STOP
    assert text(stopped) == text(events)[: text(events).index(stop)]


def test_the_end_token_ends_the_answer_and_is_counted_but_not_shown(
    engine: TransformersEngine, export: Path, tmp_path: Path
) -> None:
    prompt = engine.encode(PROMPT)
    [events] = run(engine, sequence(prompt, max_tokens=10))
    ids = _ids(engine, tokens(events))
    shutil.copytree(export, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [ids[3], 0]}))
    ending = TransformersEngine(tmp_path)
    [ended], [endless] = (
        run(ending, replace(sequence(prompt, max_tokens=10), endless=endless)) for endless in (False, True)
    )
    ending.close()
    assert _ids(engine, tokens(endless)) == ids
    assert finish(ended).reason is FinishReason.STOP
    assert finish(ended).num_tokens == len(tokens(ended)) == ids.index(ids[3]) + 1
    assert tokens(ended)[-1].text == ""
    assert text(events).startswith(text(ended).rstrip("�"))


def test_penalties_and_biases_change_the_sampled_tokens(engine: TransformersEngine) -> None:
    prompt = engine.encode(PROMPT)
    [greedy] = run(engine, sequence(prompt))
    first = _ids(engine, tokens(greedy))[0]
    biased, banned, varied = run(
        engine,
        sequence(prompt, logit_bias=((first, 100.0),), index=0),
        sequence(prompt, logit_bias=((first, -100.0),), index=1),
        sequence(prompt, logit_bias=((first, 100.0),), frequency_penalty=2.0, presence_penalty=2.0, index=2),
    )
    assert set(raws(biased)) == {raws(greedy)[0]}
    assert raws(greedy)[0] not in raws(banned)
    assert raws(varied) == raws(biased), "a bias of 100 outweighs the penalties of 20 tokens"
    assert len(set(raws(run(engine, sequence(prompt, frequency_penalty=2.0, max_tokens=60))[0]))) > len(
        set(raws(run(engine, sequence(prompt, max_tokens=60))[0]))
    )
