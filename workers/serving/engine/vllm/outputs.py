"""Translates vLLM's outputs of one sequence to events. Nothing here imports vLLM."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from workers.serving.engine.port import NOT_FINITE, EngineError, EngineEvent, SequenceRequest
from workers.serving.engine.text.detokenizer import Vocabulary
from workers.serving.engine.text.token_writer import LEAST_LOGPROB, TokenScore, TokenWriter
from workers.serving.engine.vllm.arguments import prompt_tokens
from workers.serving.generation import Finished, FinishReason

Logprobs = Mapping[int, Any]  # vLLM's Logprob by token id


class SequenceOutputs:
    """Collects one sequence's outputs. ``finished`` is set once it needs no more of them."""

    def __init__(self, request: SequenceRequest, vocabulary: Vocabulary, end_tokens: frozenset[int]) -> None:
        self._request = request
        self._end_tokens = end_tokens
        self._writer = TokenWriter(vocabulary, request)
        self._started = False
        self._num_sampled = 0
        self.finished = False

    @property
    def needs_no_model(self) -> bool:
        """Whether there is nothing to sample and nothing to score."""
        sampling = self._request.sampling
        scores = sampling.echo and sampling.num_logprobs is not None and len(self._request.prompt) > 1
        return self._request.max_tokens == 0 and not scores

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and continuation so far; 0 before the first output."""
        return len(self._request.prompt) + self._num_sampled if self._started else 0

    def events_without_model(self) -> list[EngineEvent]:
        """All events of a sequence that ``needs_no_model``."""
        return [*self._echo(self._request.prompt, [None]), self._finish(FinishReason.LENGTH)]

    def take(self, output: Any) -> list[EngineEvent]:
        """The events of a ``RequestOutput`` of kind DELTA.

        Raises EngineError if the sequence cannot continue.
        """
        events: list[EngineEvent] = []
        if not self._started:
            self._started = True
            # The first output has the scores of the whole prompt.
            events += self._echo(prompt_tokens(self._request), output.prompt_logprobs)
        [completion] = output.outputs
        for token, logprobs in zip(completion.token_ids, completion.logprobs or (), strict=True):
            events += self._take_token(token, logprobs)
            if self.finished:
                return events
        if output.finished:
            raise EngineError(f"vLLM ended the sequence: {completion.finish_reason}")
        return events

    def _echo(self, tokens: Sequence[int], logprobs: Sequence[Logprobs | None] | None) -> list[EngineEvent]:
        if not self._request.sampling.echo:
            return []
        if self._request.sampling.num_logprobs is None:
            return [self._writer.prompt_token(token, None) for token in tokens]
        return [
            self._writer.prompt_token(token, None if scored is None else self._score(token, scored))
            for token, scored in zip(tokens, logprobs or (), strict=True)
        ]

    def _take_token(self, token: int, logprobs: Logprobs) -> list[EngineEvent]:
        if self._request.max_tokens == 0:
            last = self._request.prompt[-1]
            event = self._writer.prompt_token(last, self._score(last, logprobs))
            return [event, self._finish(FinishReason.LENGTH)]
        score = self._score(token, logprobs)
        if score.logprob == LEAST_LOGPROB:  # an impossible token was sampled
            raise EngineError(NOT_FINITE)
        self._num_sampled += 1
        ends = token in self._end_tokens and not self._request.endless
        wants_score = self._request.sampling.num_logprobs is not None
        event = self._writer.sampled_token(token, score if wants_score else None, silent=ends)
        if ends or self._writer.stopped:
            return [event, self._finish(FinishReason.STOP)]
        if self._num_sampled == self._request.max_tokens:
            return [event, self._finish(FinishReason.LENGTH)]
        return [event]

    def _finish(self, reason: FinishReason) -> Finished:
        self.finished = True
        return self._writer.finish(reason, self._num_sampled)

    def _score(self, token: int, logprobs: Logprobs) -> TokenScore:
        """Convert vLLM's ``{id: Logprob}``, which always contains the token itself.

        Raises EngineError if it is NaN.
        """
        if math.isnan(logprobs[token].logprob):
            raise EngineError(NOT_FINITE)
        top: list[tuple[int, float]] = []
        if self._request.sampling.num_logprobs:
            ranked = sorted(logprobs.items(), key=lambda scored: scored[1].rank)
            top = [(id, max(each.logprob, LEAST_LOGPROB)) for id, each in ranked]
        return TokenScore(max(logprobs[token].logprob, LEAST_LOGPROB), top)
