"""Runs sequences on an engine and reads its events."""

import queue
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from workers.serving.engine.port import Engine, EngineError, EngineEvent, SequenceFailed, SequenceRequest
from workers.serving.generation import Finished, Sampling, Token


def sequence(
    prompt: Sequence[int],
    *,
    max_tokens: int = 20,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    index: int = 0,
    **sampling: Any,
) -> SequenceRequest:
    chosen = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, **sampling)
    return SequenceRequest(index, tuple(prompt), max_tokens, seed, chosen)


def run(engine: Engine, *sequences: SequenceRequest) -> list[list[EngineEvent]]:
    """Submit the sequences together and return the events of each."""
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    engine.submit(sequences, emitted.put)
    events: dict[int, list[EngineEvent]] = {request.index: [] for request in sequences}
    open_sequences = len(sequences)
    while open_sequences:
        for event in emitted.get(timeout=30):
            events[event.index].append(event)
            open_sequences -= isinstance(event, Finished | SequenceFailed)
    return [events[request.index] for request in sequences]


def check_that_closing_fails_what_is_in_flight(
    engine: Engine, prompt: Sequence[int]
) -> tuple[Callable[[], None], "queue.SimpleQueue[list[EngineEvent]]"]:
    """Returns the cancel function of the sequence that was in flight, and the queue of its events."""
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    cancel = engine.submit([sequence(prompt, max_tokens=100)], emitted.put)
    emitted.get(timeout=30)
    engine.close()
    while not isinstance(event := emitted.get(timeout=30)[0], SequenceFailed):
        pass
    assert event.message == "the engine was closed"
    with pytest.raises(EngineError):
        engine.submit([sequence(prompt)], emitted.put)
    return cancel, emitted


def tokens(events: Sequence[EngineEvent]) -> list[Token]:
    return [event for event in events if isinstance(event, Token)]


def text(events: Sequence[EngineEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Token | Finished))


def finish(events: Sequence[EngineEvent]) -> Finished:
    last = events[-1]
    assert isinstance(last, Finished), last
    return last


def raws(events: Sequence[EngineEvent]) -> list[bytes]:
    return [token.raw for token in tokens(events)]
