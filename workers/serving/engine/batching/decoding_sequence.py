"""One sequence while it waits or decodes: its state, and the events that model output adds."""

import threading
from dataclasses import dataclass, field

from torch import Tensor

from workers.serving.engine.batching.model_runner import PrefillChunk
from workers.serving.engine.batching.sampler import Sampler, all_finite, score
from workers.serving.engine.port import NOT_FINITE, EngineEvent, SequenceFailed, SequenceRequest, Sink
from workers.serving.engine.text.token_writer import TokenScore, TokenWriter
from workers.serving.generation import FinishReason


@dataclass(eq=False)
class DecodingSequence:
    """``unfed`` holds the rest of the prompt, then the token sampled last."""

    request: SequenceRequest
    sink: Sink
    cancelled: threading.Event
    writer: TokenWriter
    sampler: Sampler
    slot: int = -1
    num_fed: int = 0
    unfed: list[int] = field(default_factory=list)
    num_sampled: int = 0

    @property
    def scores_prompt(self) -> bool:
        return self.request.sampling.echo and self.request.sampling.num_logprobs is not None

    @property
    def in_prompt(self) -> bool:
        """Whether prompt tokens remain to be fed."""
        return self.num_fed < len(self.request.prompt)

    def take_logits(self, chunk: PrefillChunk, logits_TV: Tensor) -> list[EngineEvent]:
        """Record a fed chunk. Returns the prompt's echo, and the last event if nothing is left to sample."""
        events: list[EngineEvent] = []
        if self.in_prompt and self.request.sampling.echo:
            if self.scores_prompt and not all_finite(logits_TV):
                return [self.not_finite()]
            events += self._echo(chunk, logits_TV)
        self.num_fed += len(chunk.tokens)
        self.unfed = self.unfed[len(chunk.tokens) :]
        if not self.in_prompt and self.request.max_tokens == 0:
            events.append(self.writer.finish(FinishReason.LENGTH, 0))
        return events

    def take_token(
        self, token: int | None, score: TokenScore | None, end_tokens: frozenset[int]
    ) -> list[EngineEvent]:
        """Continue with a sampled token, None if the logits were not finite.

        Returns its event, and the last one if it ends.
        """
        if token is None:
            return [self.not_finite()]
        self.num_sampled += 1
        self.unfed = [token]
        ends = token in end_tokens and not self.request.endless
        event = self.writer.sampled_token(token, score, silent=ends)
        if ends or self.writer.stopped:
            return [event, self.writer.finish(FinishReason.STOP, self.num_sampled)]
        if self.num_sampled == self.request.max_tokens:
            return [event, self.writer.finish(FinishReason.LENGTH, self.num_sampled)]
        return [event]

    def not_finite(self) -> SequenceFailed:
        return SequenceFailed(self.request.index, f"EngineError: {NOT_FINITE}")

    def _echo(self, chunk: PrefillChunk, logits_TV: Tensor) -> list[EngineEvent]:
        """The prompt's tokens: scored ones chunk by chunk, others all at once with the last chunk."""
        prompt = self.request.prompt
        num_logprobs = self.request.sampling.num_logprobs
        if num_logprobs is None:
            is_last = len(chunk.tokens) == len(self.unfed)
            return [self.writer.prompt_token(token, None) for token in prompt] if is_last else []
        first: list[EngineEvent] = [self.writer.prompt_token(prompt[0], None)] if chunk.begin == 0 else []
        # Each row scores the next token: the first token has no score, and the last row has nothing to score.
        scored = prompt[chunk.begin + 1 : chunk.begin + 1 + len(chunk.tokens)]
        if not scored:
            return first
        scores = score(logits_TV[: len(scored)], scored, num_logprobs)
        return first + [self.writer.prompt_token(*pair) for pair in zip(scored, scores, strict=True)]
