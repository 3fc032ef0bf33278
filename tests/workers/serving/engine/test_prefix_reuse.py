"""Prompts that begin as others did: what of them is fed to the model, and that the answers are those of an engine with no past."""

import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.serving.engine.asking import finish, raws, run, sequence, tokens
from workers.serving.engine.forward import Piece
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import EngineEvent, SequenceRequest
from workers.serving.engine.slot_forward import SlotForward
from workers.serving.engine.slots import MIN_COPIED
from workers.serving.engine.transformers_engine import TransformersEngine
from workers.serving.generation import Finished

LONG = tuple(range(1, 81))
NUM_SAMPLED = 8
MOST, SOME = 60, 2 * MIN_COPIED  # of the tokens of LONG: more and less than half of what its slot holds


@dataclass
class Fed:
    """What has reached the forward: the tokens of pieces of more than one, and the copies between slots."""

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
    forward, copy = SlotForward.__call__, SlotForward.copy

    def recorded(self: SlotForward, pieces: Sequence[Piece]) -> torch.Tensor:
        lengths = [len(piece.tokens) for piece in pieces]
        fed.prompts += [length for length in lengths if length > 1]
        fed.num_singles += lengths.count(1)
        return forward(self, pieces)

    def copied(self: SlotForward, source: int, target: int, num_tokens: int) -> None:
        fed.copies.append((source, target, num_tokens))
        copy(self, source, target, num_tokens)

    monkeypatch.setattr(SlotForward, "__call__", recorded)
    monkeypatch.setattr(SlotForward, "copy", copied)
    return fed


def asked(prompt: Sequence[int], **sampling: Any) -> SequenceRequest:
    return sequence(prompt, **{"max_tokens": NUM_SAMPLED} | sampling)


def begun_like(num_shared: int) -> tuple[int, ...]:
    """As long as LONG, and another after the tokens that they share."""
    return (*LONG[:num_shared], *(token + 100 for token in LONG[num_shared:]))


def fresh(export: Path, *requests: SequenceRequest) -> list[list[EngineEvent]]:
    """Their answers, each by an engine that has seen nothing."""
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


def test_a_prompt_that_comes_again_has_only_its_last_token_fed(
    engine: TransformersEngine, fed: Fed, export: Path
) -> None:
    [expected] = fresh(export, asked(LONG))
    fed.forget()
    [first] = run(engine, asked(LONG))
    assert fed.prompts == [len(LONG)]
    assert fed.num_singles == NUM_SAMPLED - 1
    fed.forget()
    [again] = run(engine, asked(LONG))
    assert fed == Fed(prompts=[], num_singles=NUM_SAMPLED, copies=[])
    for answer in (first, again):
        assert_alike(answer, expected)


@pytest.mark.parametrize(("num_shared", "num_copies"), [(MOST, 0), (SOME, 1)])
def test_of_one_that_only_begins_alike_the_rest_is_fed(
    engine: TransformersEngine, fed: Fed, export: Path, num_shared: int, num_copies: int
) -> None:
    other = begun_like(num_shared)
    [expected, expected_of_first] = fresh(export, asked(other), asked(LONG))
    run(engine, asked(LONG))
    fed.forget()
    [events] = run(engine, asked(other))
    assert fed.prompts == [len(other) - num_shared]
    assert [num_tokens for _, _, num_tokens in fed.copies] == [num_shared] * num_copies
    assert_alike(events, expected)
    [first] = run(engine, asked(LONG))
    assert_alike(first, expected_of_first)


def test_what_is_too_short_to_be_copied_is_fed(engine: TransformersEngine, fed: Fed, export: Path) -> None:
    other = begun_like(MIN_COPIED - 1)
    [expected] = fresh(export, asked(other))
    run(engine, asked(LONG))
    fed.forget()
    [events] = run(engine, asked(other))
    assert fed.prompts == [len(other)]
    assert fed.copies == []
    assert_alike(events, expected)


@pytest.mark.parametrize("num_shared", [SOME, MOST])
def test_what_a_running_sequence_holds_is_copied_and_both_go_on_as_if_alone(
    engine: TransformersEngine, fed: Fed, export: Path, num_shared: int
) -> None:
    running, other = asked(LONG, max_tokens=40), asked(begun_like(num_shared))
    expected = fresh(export, running, other)
    fed.forget()
    heard: list[EngineEvent] = []
    heard_of_other: list[EngineEvent] = []
    ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def sink_of_other(events: list[EngineEvent]) -> None:
        heard_of_other.extend(events)
        if isinstance(events[-1], Finished):
            ended.put(None)

    def sink(events: list[EngineEvent]) -> None:
        if not heard:  # the turn of its first token: its slot is in use
            engine.submit([other], sink_of_other)
        heard.extend(events)
        if isinstance(events[-1], Finished):
            ended.put(None)

    engine.submit([running], sink)
    for _ in range(2):
        ended.get(timeout=30)
    assert fed.prompts == [len(LONG), len(LONG) - num_shared]
    [(source, target, num_copied)] = fed.copies
    assert source != target
    assert num_copied == num_shared
    assert_alike(heard, expected[0])
    assert_alike(heard_of_other, expected[1])


def test_prompts_that_come_together_are_fed_once(engine: TransformersEngine, fed: Fed, export: Path) -> None:
    [expected] = fresh(export, asked(LONG))
    fed.forget()
    answers = run(engine, *(asked(LONG, index=index) for index in range(3)))
    assert fed.prompts == [len(LONG)]
    assert [num_tokens for _, _, num_tokens in fed.copies] == [len(LONG) - 1] * 2
    for events in answers:
        assert raws(events) == raws(expected)


def test_a_prompt_that_is_scored_is_fed_whole_however_often_it_comes(
    engine: TransformersEngine, fed: Fed, export: Path
) -> None:
    scored = asked(LONG, echo=True, num_logprobs=1)
    [expected] = fresh(export, scored)
    run(engine, asked(LONG))
    for _ in range(2):
        fed.forget()
        [events] = run(engine, scored)
        assert fed.prompts == [len(LONG)]
        assert fed.copies == []
        assert_scored_alike(events, expected)
    fed.forget()
    run(engine, asked(LONG))
    assert fed.prompts == [], "what was fed to score it is of use to others"
