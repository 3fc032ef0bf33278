import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_export import CONTEXT_LENGTH, write_tiny_export
from tests.workers.serving.engine.asking import (
    check_that_closing_fails_what_is_in_flight,
    finish,
    raws,
    run,
    sequence,
    text,
    tokens,
)
from workers.serving.engine import slot_decoder
from workers.serving.engine.forward import Piece
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import EngineError, EngineEvent, QueueFull, SequenceFailed
from workers.serving.engine.slot_forward import SlotForward
from workers.serving.engine.transformers_engine import TransformersEngine
from workers.serving.generation import Chat, ChatMessage, Finished, FinishReason, Token

PROMPT = "The cat sat on"


@pytest.fixture(scope="module", params=[False, True], ids=["in this process", "in its own"])
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


def test_greedy_equals_generate_token_for_token(engine: TransformersEngine, model: Any, export: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export)
    prompts = [engine.encode(prompt) for prompt in (PROMPT, "Grüße", "the dog", "5 €")]
    requests = [sequence(prompt, max_tokens=60, index=index) for index, prompt in enumerate(prompts)]
    for prompt, events in zip(prompts, run(engine, *requests), strict=True):
        expected = generated(model, prompt, 60)
        assert len(tokens(events)) == len(expected) == finish(events).num_tokens
        assert raws(events) == [token.raw for token in _named(engine, expected)]
        assert text(events) == tokenizer.decode(expected, skip_special_tokens=True)


def _named(engine: TransformersEngine, ids: Sequence[int]) -> list[Token]:
    """The tokens of the ids, by echoing them."""
    [events] = run(engine, sequence(ids, max_tokens=0, echo=True))
    return tokens(events)


def test_a_prompt_in_several_chunks_gives_the_same_answer(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(export)
    request = sequence(engine.encode(PROMPT * 4), echo=True, num_logprobs=1)
    [whole] = run(engine, request)
    monkeypatch.setattr(slot_decoder, "PREFILL_TOKENS", 5)
    [chunked] = run(engine, request)
    assert raws(chunked) == raws(whole)
    for ours, theirs in zip(tokens(chunked)[1:], tokens(whole)[1:], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    engine.close()


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


def _ids(engine: TransformersEngine, answer: Sequence[Token]) -> list[int]:
    by_raw = {token.raw: id for id, token in enumerate(_named(engine, range(100)))}
    for start in range(100, engine.vocab_size, 100):
        named = _named(engine, range(start, min(start + 100, engine.vocab_size)))
        by_raw |= {token.raw: start + position for position, token in enumerate(named)}
    return [by_raw[token.raw] for token in answer]


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


def test_the_end_token_ends_the_answer_and_counts_but_is_not_shown(
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


def test_an_empty_prompt_is_the_token_texts_begin_with(engine: TransformersEngine) -> None:
    assert engine.encode("") == (0,)


def test_a_conversation_without_a_template_is_plain_text(engine: TransformersEngine) -> None:
    chat = Chat((ChatMessage("system", "Be brief."), ChatMessage("user", "Hello")))
    ids, stop = engine.encode_chat(chat)
    assert ids == engine.encode("system: Be brief.\nuser: Hello\nassistant:")
    assert "\nuser:" in stop


def test_a_template_of_the_tokenizer_is_used_and_may_refuse(export: Path) -> None:
    engine = TransformersEngine(export)
    engine._tokenizer._tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    )
    assert engine.encode_chat(Chat((ChatMessage("user", "Hi"),))) == (engine.encode("[Hi]"), ())
    with pytest.raises(ValueError, match="no system here"):
        engine.encode_chat(Chat((ChatMessage("system", "Hi"),)))
    engine.close()


@pytest.mark.parametrize("own_process", [False, True])
def test_a_version_whose_logits_are_not_finite_is_not_loaded(tmp_path: Path, own_process: bool) -> None:
    write_tiny_export(tmp_path, seed=1, broken=True)
    with pytest.raises(EngineError, match="not finite"):
        TransformersEngine(tmp_path, own_process=own_process)


def test_logits_that_become_not_finite_fail_the_sequence_and_what_it_held_is_forgotten(export: Path) -> None:
    engine = TransformersEngine(export)
    [before] = run(engine, sequence([1, 2, 3]))
    forward = engine._decoding._decoder._forward  # type: ignore[attr-defined]
    norm = forward._model.model.norm.weight
    with torch.inference_mode():
        whole = norm.clone()
        norm.fill_(float("nan"))
        [[failure]] = run(engine, sequence([1, 2, 3]))
        [[scored]] = run(engine, sequence([1, 2, 3], max_tokens=0, echo=True, num_logprobs=0))
        norm.copy_(whole)
    for failed in (failure, scored):
        assert isinstance(failed, SequenceFailed)
        assert "not finite" in failed.message
    [after] = run(engine, sequence([1, 2, 3]))
    assert raws(after) == raws(before)
    engine.close()


def test_penalties_and_biases_change_what_is_chosen(engine: TransformersEngine) -> None:
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
    assert raws(varied) == raws(biased), "100 is more than 20 tokens are penalised by"
    assert len(set(raws(run(engine, sequence(prompt, frequency_penalty=2.0, max_tokens=60))[0]))) > len(
        set(raws(run(engine, sequence(prompt, max_tokens=60))[0]))
    )


@pytest.mark.parametrize("own_process", [False, True])
def test_a_full_queue_refuses_a_request_whole_and_cancelled_ones_make_room(
    export: Path, own_process: bool
) -> None:
    options = EngineOptions(max_slots=1, max_waiting=2)
    engine = TransformersEngine(export, options=options, own_process=own_process)
    started = threading.Event()
    begin: Callable[[list[EngineEvent]], None] = lambda _: started.set()  # noqa: E731
    prompt = engine.encode(PROMPT)
    long = sequence(prompt, max_tokens=CONTEXT_LENGTH - len(prompt))
    cancels = [engine.submit([long], begin)]
    assert started.wait(30)
    cancels.append(engine.submit([long, long], begin))
    with pytest.raises(QueueFull):
        engine.submit([long], begin)
    with pytest.raises(QueueFull):
        engine.check_room()
    for cancel in cancels:
        cancel()
    engine.check_room()
    [events] = run(engine, sequence(prompt, max_tokens=2))
    assert finish(events).num_tokens == 2
    engine.close()


def test_prompts_are_read_in_pieces_that_keep_nobody_waiting_for_long(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One thread: several, beside another process that computes, wait for each other.
    engine = TransformersEngine(export, 1, EngineOptions(max_slots=2))
    prompt = [1 + index % 200 for index in range(120)]
    [expected] = run(engine, sequence(prompt, max_tokens=3))
    forward, fed, seconds_each = SlotForward.__call__, list[int](), [0.005]

    def slow(self: SlotForward, pieces: Sequence[Piece]) -> torch.Tensor:
        num_tokens = sum(len(piece.tokens) for piece in pieces)
        fed.append(num_tokens)
        time.sleep(num_tokens * seconds_each[0])
        return forward(self, pieces)

    monkeypatch.setattr(slot_decoder, "PREFILL_SECONDS", 0.2)
    monkeypatch.setattr(SlotForward, "__call__", slow)
    run(engine, sequence(prompt[::-1], max_tokens=1))
    assert fed == [120], "so slow it had not been"
    fed.clear()
    run(engine, sequence([7, *prompt], max_tokens=1))
    assert max(fed) <= 40
    assert sum(fed) == 121
    seconds_each[0] = 0.0
    run(engine, sequence([8, *prompt], max_tokens=1))
    fed.clear()
    run(engine, sequence([9, *prompt], max_tokens=1))
    assert fed == [121], "and it reads as fast as before"
    assert raws(run(engine, sequence(prompt, max_tokens=3))[0]) == raws(expected)
    engine.close()


def test_of_a_prompt_far_beyond_the_context_no_more_is_read_than_says_so(export: Path) -> None:
    engine = TransformersEngine(export)
    assert 2 * CONTEXT_LENGTH < len(engine.encode(PROMPT * 1_000_000)) <= 32 * CONTEXT_LENGTH
    chat = Chat((ChatMessage("user", PROMPT * 1_000_000),))
    assert 2 * CONTEXT_LENGTH < len(engine.encode_chat(chat)[0]) <= 32 * CONTEXT_LENGTH
    whole = PROMPT * CONTEXT_LENGTH  # not so far
    assert len(engine.encode(whole)) > CONTEXT_LENGTH
    assert tuple(AutoTokenizer.from_pretrained(export)(whole)["input_ids"]) == engine.encode(whole)
    engine.close()


def test_what_free_slots_take_at_once_waits_for_nobody(export: Path) -> None:
    engine = TransformersEngine(export, options=EngineOptions(max_slots=4, max_waiting=1))
    prompt = engine.encode(PROMPT)
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    for index in range(4):
        engine.submit([sequence(prompt, index=index, max_tokens=60)], emitted.put)
    engine.submit([sequence(prompt, index=4, max_tokens=60)], emitted.put)
    with pytest.raises(QueueFull):
        engine.submit([sequence(prompt)], emitted.put)
    engine.close()


def test_where_all_that_waits_is_cancelled_no_turn_is_taken(
    export: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = TransformersEngine(export, options=EngineOptions(max_slots=1))
    prompt = engine.encode(PROMPT)
    begun, go_on = threading.Event(), threading.Event()

    def hold(_: list[EngineEvent]) -> None:  # the engine's own thread
        begun.set()
        assert go_on.wait(30)

    first = engine.submit([sequence(prompt)], hold)
    assert begun.wait(30)
    second = engine.submit([sequence(prompt)], hold)
    first()
    second()
    go_on.set()
    [events] = run(engine, sequence(prompt, max_tokens=2))
    assert finish(events).num_tokens == 2
    assert "a turn failed" not in caplog.text
    engine.close()


def test_prompts_go_first_but_not_three_times_in_a_row(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_decoder, "PREFILL_TOKENS", 40)
    engine = TransformersEngine(export)
    prompts = {name: engine.encode(name * 9) for name in "abcd"}
    longest = tuple(range(1, 100))
    fed: list[list[int]] = []  # tokens of every piece, turn by turn
    forward = SlotForward.__call__

    def recorded(self: SlotForward, pieces: Sequence[Piece]) -> torch.Tensor:
        fed.append([len(piece.tokens) for piece in pieces])
        return forward(self, pieces)

    monkeypatch.setattr(SlotForward, "__call__", recorded)
    ended: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()

    def begin(name: str, then: Callable[[], None] = lambda: None) -> None:
        """``then``: at its first token, within that turn."""
        heard: list[EngineEvent] = []

        def sink(events: list[EngineEvent]) -> None:
            if not heard:
                then()
            heard.extend(events)
            if isinstance(events[-1], Finished):
                ended.put(heard)

        prompt = longest if name == "long" else prompts[name]
        engine.submit([sequence(prompt, max_tokens=12)], sink)

    # b comes while a is continued, c at b's first token, d at c's: the two turns before were b's and c's alone. Then one that
    # takes three turns.
    begin("a", lambda: begin("b", lambda: begin("c", lambda: begin("d", lambda: begin("long")))))
    for _ in range(5):
        ended.get(timeout=30)
    of_a, of_b, of_c, of_d = (len(prompts[name]) for name in "abcd")
    assert fed[:4] == [[of_a], [of_b], [of_c], [1, 1, 1, of_d]]
    assert fed[4:7] == [[1, 1, 1, 1, 40], [1, 1, 1, 1, 40], [19]]
    assert fed[7] == [1, 1, 1, 1, 1]
    engine.close()


@pytest.mark.parametrize("own_process", [False, True])
def test_closing_fails_what_is_in_flight_and_refuses_more(export: Path, own_process: bool) -> None:
    engine = TransformersEngine(export, own_process=own_process)
    check_that_closing_fails_what_is_in_flight(engine, engine.encode(PROMPT))


@pytest.mark.parametrize("own_process", [False, True])
def test_a_folder_that_is_no_export_is_refused(export: Path, tmp_path: Path, own_process: bool) -> None:
    with pytest.raises((OSError, ValueError)):
        TransformersEngine(tmp_path, own_process=own_process)
    shutil.copytree(export, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises((OSError, ValueError)):
        TransformersEngine(tmp_path, own_process=own_process)
