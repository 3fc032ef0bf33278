"""Prompts with a common prefix are fed only in part, and answered as by a fresh engine."""

import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.serving.engine.engine_client import finish, raws, run, sequence, tokens
from workers.serving.engine.batching.model_runner import PrefillChunk
from workers.serving.engine.batching.slot_runner import SlotRunner
from workers.serving.engine.batching.slots import MIN_COPIED
from workers.serving.engine.batching.transformers_engine import TransformersEngine
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import EngineEvent, SequenceRequest
from workers.serving.generation import Finished

LONG = tuple(range(1, 81))
NUM_SAMPLED = 8
MOST, SOME = 60, 2 * MIN_COPIED  # shared tokens: more and less than half of LONG


@dataclass
class Fed:
    """The lengths of chunks with several tokens, the number of single ones, and the slot copies."""

    prompts: list[int] = field(default_factory=list)
    num_singles: int = 0
    copies: list[tuple[int, int, int]] = field(default_factory=list)

    def forget(self) -> None:
        self.prompts, self.num_singles, self.copies = [], 0, []


@pytest.fixture
def engine(export: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(export, options=EngineOptions(max_slots=4))
    yield engine
    engine.close()


@pytest.fixture
def fed(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> Fed:
    fed = Fed()
    run_chunks, copy = SlotRunner.__call__, SlotRunner.copy

    def recorded(self: SlotRunner, chunks: Sequence[PrefillChunk]) -> torch.Tensor:
        lengths = [len(chunk.tokens) for chunk in chunks]
        fed.prompts += [length for length in lengths if length > 1]
        fed.num_singles += lengths.count(1)
        return run_chunks(self, chunks)

    def copied(self: SlotRunner, source: int, target: int, num_tokens: int) -> None:
        fed.copies.append((source, target, num_tokens))
        copy(self, source, target, num_tokens)

    monkeypatch.setattr(SlotRunner, "__call__", recorded)
    monkeypatch.setattr(SlotRunner, "copy", copied)
    return fed


def request(prompt: Sequence[int], **sampling: Any) -> SequenceRequest:
    return sequence(prompt, **{"max_tokens": NUM_SAMPLED} | sampling)


def prompt_sharing(num_shared: int) -> tuple[int, ...]:
    """A prompt as long as LONG that shares its first tokens."""
    return (*LONG[:num_shared], *(token + 100 for token in LONG[num_shared:]))


def fresh(export: Path, *requests: SequenceRequest) -> list[list[EngineEvent]]:
    """The answers of fresh engines, one for each request."""
    answers = []
    for request in requests:
        engine = TransformersEngine(export, options=EngineOptions(max_slots=4))
        answers += run(engine, request)
        engine.close()
    return answers


def assert_alike(events: Sequence[EngineEvent], expected: Sequence[EngineEvent]) -> None:
    assert raws(events) == raws(expected)
    assert finish(events) == finish(expected)


def assert_scored_alike(events: Sequence[EngineEvent], expected: Sequence[EngineEvent]) -> None:
    assert_alike(events, expected)
    for ours, theirs in zip(tokens(events)[1:], tokens(expected)[1:], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_only_the_last_token_of_a_repeated_prompt_is_fed(
    engine: TransformersEngine, fed: Fed, export: Path
) -> None:
    [expected] = fresh(export, request(LONG))
    fed.forget()
    [first] = run(engine, request(LONG))
    assert fed.prompts == [len(LONG)]
    assert fed.num_singles == NUM_SAMPLED - 1
    fed.forget()
    [again] = run(engine, request(LONG))
    assert fed == Fed(prompts=[], num_singles=NUM_SAMPLED, copies=[])
    for answer in (first, again):
        assert_alike(answer, expected)


@pytest.mark.parametrize(("num_shared", "num_copies"), [(MOST, 0), (SOME, 1)])
def test_only_the_rest_of_a_prompt_with_a_known_prefix_is_fed(
    engine: TransformersEngine, fed: Fed, export: Path, num_shared: int, num_copies: int
) -> None:
    other = prompt_sharing(num_shared)
    [expected, expected_of_first] = fresh(export, request(other), request(LONG))
    run(engine, request(LONG))
    fed.forget()
    [events] = run(engine, request(other))
    assert fed.prompts == [len(other) - num_shared]
    assert [num_tokens for _, _, num_tokens in fed.copies] == [num_shared] * num_copies
    assert_alike(events, expected)
    [first] = run(engine, request(LONG))
    assert_alike(first, expected_of_first)


def test_a_prefix_too_short_to_copy_is_fed(engine: TransformersEngine, fed: Fed, export: Path) -> None:
    other = prompt_sharing(MIN_COPIED - 1)
    [expected] = fresh(export, request(other))
    run(engine, request(LONG))
    fed.forget()
    [events] = run(engine, request(other))
    assert fed.prompts == [len(other)]
    assert fed.copies == []
    assert_alike(events, expected)


@pytest.mark.parametrize("num_shared", [SOME, MOST])
def test_a_prefix_of_a_running_sequence_is_copied_and_both_answer_as_if_alone(
    engine: TransformersEngine, fed: Fed, export: Path, num_shared: int
) -> None:
    running, other = request(LONG, max_tokens=40), request(prompt_sharing(num_shared))
    expected = fresh(export, running, other)
    fed.forget()
    events_of_running: list[EngineEvent] = []
    events_of_other: list[EngineEvent] = []
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def sink_of_other(events: list[EngineEvent]) -> None:
        events_of_other.extend(events)
        if isinstance(events[-1], Finished):
            ended.put(None)

    def sink(events: list[EngineEvent]) -> None:
        if not events_of_running:  # at its first token its slot is in use
            engine.submit([other], sink_of_other)
        events_of_running.extend(events)
        if isinstance(events[-1], Finished):
            ended.put(None)

    engine.submit([running], sink)
    for _ in range(2):
        ended.get(timeout=30)
    assert fed.prompts == [len(LONG), len(LONG) - num_shared]
    [(source, target, num_copied)] = fed.copies
    assert source != target
    assert num_copied == num_shared
    assert_alike(events_of_running, expected[0])
    assert_alike(events_of_other, expected[1])


def test_equal_prompts_that_arrive_together_are_fed_once(
    engine: TransformersEngine, fed: Fed, export: Path
) -> None:
    [expected] = fresh(export, request(LONG))
    fed.forget()
    answers = run(engine, *(request(LONG, index=index) for index in range(3)))
    assert fed.prompts == [len(LONG)]
    assert [num_tokens for _, _, num_tokens in fed.copies] == [len(LONG) - 1] * 2
    for events in answers:
        assert raws(events) == raws(expected)


def test_a_scored_prompt_is_always_fed_as_a_whole(engine: TransformersEngine, fed: Fed, export: Path) -> None:
    scored = request(LONG, echo=True, num_logprobs=1)
    [expected] = fresh(export, scored)
    run(engine, request(LONG))
    for _ in range(2):
        fed.forget()
        [events] = run(engine, scored)
        assert fed.prompts == [len(LONG)]
        assert fed.copies == []
        assert_scored_alike(events, expected)
    fed.forget()
    run(engine, request(LONG))
    assert fed.prompts == [], "other requests may reuse a scored prompt"
