"""What a version has to show before it may answer anybody: finite logits, and the speed that is asked of it."""

import queue
import time
from dataclasses import dataclass

from service.core.serving_specs import LimitsSpec
from workers.serving.engine.port import Engine, EngineError, EngineEvent, SequenceFailed, SequenceRequest
from workers.serving.generation import Finished, Sampling, Token

TEXT = "What a model is asked first is how fast it answers. "
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 16


@dataclass(frozen=True)
class Pace:
    first_token_seconds: float
    token_seconds: float


class TooSlow(Exception):
    """The version is slower than its limits allow."""


def warm_up(engine: Engine, limits: LimitsSpec, seconds: float) -> None:
    """Have it continue a prompt, alone. Raises EngineError, e.g. where its logits are not finite, TooSlow, and TimeoutError
    where that takes more than ``seconds``.
    """
    deadline = time.monotonic() + seconds
    prompt = engine.encode(TEXT)
    prompt = (prompt * -(-PROMPT_TOKENS // len(prompt)))[: min(PROMPT_TOKENS, engine.context_length // 2)]
    num_tokens = min(OUTPUT_TOKENS, engine.context_length - len(prompt))
    _run(engine, prompt, num_tokens, deadline)  # pays for what is done once
    pace = _run(engine, prompt, num_tokens, deadline)
    asked = [
        ("to the first token", pace.first_token_seconds, limits.first_token_seconds),
        ("per token", pace.token_seconds, limits.token_seconds),
    ]
    slow = [
        f"{taken:.3g} s {what}, {limit:g} s are allowed"
        for what, taken, limit in asked
        if limit is not None and taken > limit
    ]
    if slow:
        raise TooSlow("; ".join(slow))


def _run(engine: Engine, prompt: tuple[int, ...], num_tokens: int, deadline: float) -> Pace:
    events: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    sampling = Sampling(max_tokens=num_tokens, temperature=0.0)
    began = time.monotonic()
    engine.submit([SequenceRequest(0, prompt, num_tokens, 0, sampling, endless=True)], events.put)
    first = None
    while True:
        try:
            some = events.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            raise TimeoutError("loaded, but not warm in time") from None
        for event in some:
            if isinstance(event, SequenceFailed):
                raise EngineError(event.message)
            if isinstance(event, Token) and first is None:
                first = time.monotonic()
            if isinstance(event, Finished):
                ended = time.monotonic()
                first = first or ended
                return Pace(first - began, (ended - first) / max(event.num_tokens - 1, 1))
