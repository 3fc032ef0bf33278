"""Which sequences run in which engine step, and which requests the engine rejects."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tests.support.tiny_export import CONTEXT_LENGTH
from tests.workers.serving.engine.engine_client import (
    finish,
    raws,
    run,
    sequence,
    tokens,
)
from workers.serving.engine.batching import step_planner
from workers.serving.engine.batching.model_runner import PrefillChunk
from workers.serving.engine.batching.slot_runner import SlotRunner
from workers.serving.engine.batching.transformers_engine import TransformersEngine
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import EngineEvent, QueueFull
from workers.serving.generation import Finished

PROMPT = "The cat sat on"


def test_a_prompt_in_several_chunks_gives_the_same_answer(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TransformersEngine(export)
    request = sequence(engine.encode(PROMPT * 4), echo=True, num_logprobs=1)
    [whole] = run(engine, request)
    monkeypatch.setattr(step_planner, "PREFILL_TOKENS", 5)
    [chunked] = run(engine, request)
    assert raws(chunked) == raws(whole)
    for ours, theirs in zip(tokens(chunked)[1:], tokens(whole)[1:], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    engine.close()


def test_slow_prefill_is_cut_into_chunks_that_bound_the_step_time(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One thread, because several would wait for each other beside other busy processes.
    engine = TransformersEngine(export, 1, EngineOptions(max_slots=2))
    prompt = [1 + index % 200 for index in range(120)]
    [expected] = run(engine, sequence(prompt, max_tokens=3))
    run_chunks, fed, seconds_per_token = SlotRunner.__call__, list[int](), [0.005]

    def slow(self: SlotRunner, chunks: Sequence[PrefillChunk]) -> torch.Tensor:
        num_tokens = sum(len(chunk.tokens) for chunk in chunks)
        fed.append(num_tokens)
        time.sleep(num_tokens * seconds_per_token[0])
        return run_chunks(self, chunks)

    monkeypatch.setattr(step_planner, "PREFILL_SECONDS", 0.2)
    monkeypatch.setattr(SlotRunner, "__call__", slow)
    run(engine, sequence(prompt[::-1], max_tokens=1))
    assert fed == [120], "the planner does not know yet how slow it is"
    fed.clear()
    run(engine, sequence([7, *prompt], max_tokens=1))
    assert max(fed) <= 40
    assert sum(fed) == 121
    seconds_per_token[0] = 0.0
    run(engine, sequence([8, *prompt], max_tokens=1))
    fed.clear()
    run(engine, sequence([9, *prompt], max_tokens=1))
    assert fed == [121], "fast again"
    assert raws(run(engine, sequence(prompt, max_tokens=3))[0]) == raws(expected)
    engine.close()


def test_prompts_have_at_most_two_steps_of_their_own_in_a_row(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_planner, "PREFILL_TOKENS", 40)
    engine = TransformersEngine(export)
    prompts = {name: engine.encode(name * 9) for name in "abcd"}
    longest = tuple(range(1, 100))
    fed: list[list[int]] = []  # chunk lengths, step by step
    run_chunks = SlotRunner.__call__

    def recorded(self: SlotRunner, chunks: Sequence[PrefillChunk]) -> torch.Tensor:
        fed.append([len(chunk.tokens) for chunk in chunks])
        return run_chunks(self, chunks)

    monkeypatch.setattr(SlotRunner, "__call__", recorded)
    ended: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()

    def begin(name: str, then: Callable[[], None] = lambda: None) -> None:
        """Call ``then`` at the first token, within that step."""
        received: list[EngineEvent] = []

        def sink(events: list[EngineEvent]) -> None:
            if not received:
                then()
            received.extend(events)
            if isinstance(events[-1], Finished):
                ended.put(received)

        prompt = longest if name == "long" else prompts[name]
        engine.submit([sequence(prompt, max_tokens=12)], sink)

    # b arrives while a decodes, c at b's first token, d at c's: b and c have had the two steps of their own.
    # The last prompt takes three steps.
    begin("a", lambda: begin("b", lambda: begin("c", lambda: begin("d", lambda: begin("long")))))
    for _ in range(5):
        ended.get(timeout=30)
    of_a, of_b, of_c, of_d = (len(prompts[name]) for name in "abcd")
    assert fed[:4] == [[of_a], [of_b], [of_c], [1, 1, 1, of_d]]
    assert fed[4:7] == [[1, 1, 1, 1, 40], [1, 1, 1, 1, 40], [19]]
    assert fed[7] == [1, 1, 1, 1, 1]
    engine.close()


def test_sequences_that_free_slots_take_at_once_do_not_count_as_waiting(export: Path) -> None:
    engine = TransformersEngine(export, options=EngineOptions(max_slots=4, max_waiting=1))
    prompt = engine.encode(PROMPT)
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    for index in range(4):
        engine.submit([sequence(prompt, index=index, max_tokens=60)], emitted.put)
    engine.submit([sequence(prompt, index=4, max_tokens=60)], emitted.put)
    with pytest.raises(QueueFull):
        engine.submit([sequence(prompt)], emitted.put)
    engine.close()


def test_no_step_runs_if_all_waiting_sequences_are_cancelled(
    export: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = TransformersEngine(export, options=EngineOptions(max_slots=1))
    prompt = engine.encode(PROMPT)
    begun, go_on = threading.Event(), threading.Event()

    def hold(_: list[EngineEvent]) -> None:  # runs in the engine's thread
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
    assert "an engine step failed" not in caplog.text
    engine.close()


@pytest.mark.parametrize("own_process", [False, True])
def test_a_full_queue_rejects_a_whole_request_and_cancellation_makes_room(
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
