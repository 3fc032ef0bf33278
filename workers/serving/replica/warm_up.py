"""Warm-up of a loaded version: it must produce finite logits at the required speed before it takes requests."""

import queue
import time
from dataclasses import dataclass

from service.core.serving_specs import LimitsSpec
from workers.serving.engine.port import Engine, EngineError, EngineEvent, SequenceFailed, SequenceRequest
from workers.serving.generation import Finished, Sampling, Token

TEXT = "This prompt measures how fast a model answers. "
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 16


@dataclass(frozen=True)
class Latency:
    first_token_seconds: float
    token_seconds: float


class TooSlow(Exception):
    """The version is slower than its limits allow."""


def warm_up(engine: Engine, limits: LimitsSpec, seconds: float) -> None:
    """Let the engine continue a prompt and check its speed.

    Raises EngineError, e.g. for logits that are not finite, TooSlow, and TimeoutError after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    prompt = engine.encode(TEXT)
    prompt = (prompt * -(-PROMPT_TOKENS // len(prompt)))[: min(PROMPT_TOKENS, engine.context_length // 2)]
    num_tokens = min(OUTPUT_TOKENS, engine.context_length - len(prompt))
    _run(engine, prompt, num_tokens, deadline)  # includes one-time costs, so it is not measured
    latency = _run(engine, prompt, num_tokens, deadline)
    checks = [
        ("to the first token", latency.first_token_seconds, limits.first_token_seconds),
        ("per token", latency.token_seconds, limits.token_seconds),
    ]
    violations = [
        f"{measured:.3g} s {what}, but the limit is {limit:g} s"
        for what, measured, limit in checks
        if limit is not None and measured > limit
    ]
    if violations:
        raise TooSlow("; ".join(violations))


def _run(engine: Engine, prompt: tuple[int, ...], num_tokens: int, deadline: float) -> Latency:
    batches: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    sampling = Sampling(max_tokens=num_tokens, temperature=0.0)
    started = time.monotonic()
    engine.submit([SequenceRequest(0, prompt, num_tokens, 0, sampling, endless=True)], batches.put)
    first = None
    while True:
        try:
            events = batches.get(timeout=max(deadline - time.monotonic(), 0.0))
        except queue.Empty:
            raise TimeoutError("loaded, but not warm in time") from None
        for event in events:
            if isinstance(event, SequenceFailed):
                raise EngineError(event.message)
            if isinstance(event, Token) and first is None:
                first = time.monotonic()
            if isinstance(event, Finished):
                ended = time.monotonic()
                first = first or ended
                return Latency(first - started, (ended - first) / max(event.num_tokens - 1, 1))
