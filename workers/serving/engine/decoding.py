"""One sequence on a transformers model: prefill, then a token at a time, each turn a step of a generator.

A turn is one forward pass, so that many sequences can share a thread fairly. The state of a sequence is its
generator's frame: closing the generator frees its cache.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from workers.serving.engine.detokenizer import StopStrings, Vocabulary
from workers.serving.engine.port import EngineError, SequenceRequest
from workers.serving.engine.sampling import Score, choose, score
from workers.serving.generation import Alternative, Finished, FinishReason, Token

PREFILL_TOKENS = 512  # a longer prompt takes several turns
SCORED_LOGITS = 1 << 24  # rows of logits kept at once while scoring a prompt, times vocabulary: 64 MiB


class SequenceDecoder:
    """Decodes sequences of one loaded model; holds nothing that belongs to a single sequence."""

    def __init__(
        self, model: Any, vocabulary: Vocabulary, end_tokens: frozenset[int], device: torch.device
    ) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._end_tokens = end_tokens
        self._device = device
        self._vocab_size: int = model.config.get_text_config().vocab_size
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def decode(self, request: SequenceRequest) -> Iterator[list[Token | Finished]]:
        """Yield the events of each turn; the last is ``Finished``. Raises EngineError for logits that are not
        finite.
        """
        sampling = request.sampling
        generator = torch.Generator().manual_seed(request.seed)
        cache = DynamicCache(config=self._model.config)
        writer = _TokenWriter(self._vocabulary, request)
        scoring = sampling.echo and sampling.num_logprobs is not None
        row_V = torch.empty(0)
        for begin, end in _chunks(len(request.prompt), self._prefill_tokens(scoring)):
            tokens = request.prompt[begin:end]
            logits_TV = self._forward(tokens, cache, keep=len(tokens) if scoring else 1)
            row_V = logits_TV[-1]
            events: list[Token | Finished] = []
            if sampling.echo:
                # A row predicts the next token: the prompt's first has no score, the last row none to score.
                if begin == 0:
                    events.append(writer.prompt_token(request.prompt[0], None))
                predicted = request.prompt[begin + 1 : end + 1]
                scores: Sequence[Score | None] = [None] * len(predicted)
                if scoring and predicted:
                    assert sampling.num_logprobs is not None
                    scores = score(
                        logits_TV[: len(predicted)], torch.tensor(predicted), sampling.num_logprobs
                    )
                events += [writer.prompt_token(*pair) for pair in zip(predicted, scores, strict=True)]
            if end < len(request.prompt) or request.max_tokens > 0:
                yield events
            else:
                yield [*events, writer.finish(FinishReason.LENGTH, 0)]
                return
        for count in range(1, request.max_tokens + 1):
            token = choose(row_V, temperature=sampling.temperature, top_p=sampling.top_p, generator=generator)
            token_score = None
            if sampling.num_logprobs is not None:
                token_score = score(row_V[None], torch.tensor([token]), sampling.num_logprobs)[0]
            ends = token in self._end_tokens
            event = writer.sampled_token(token, token_score, silent=ends)
            if ends or writer.stopped:
                yield [event, writer.finish(FinishReason.STOP, count)]
                return
            if count == request.max_tokens:
                yield [event, writer.finish(FinishReason.LENGTH, count)]
                return
            yield [event]
            row_V = self._forward((token,), cache, keep=1)[-1]

    def _forward(self, tokens: Sequence[int], cache: DynamicCache, *, keep: int) -> Tensor:
        """Logits of the last ``keep`` tokens, float32 on the CPU, so that seeds mean the same everywhere."""
        arguments: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_logits else {}
        tokens_BT = torch.tensor([tokens], device=self._device)
        output = self._model(input_ids=tokens_BT, past_key_values=cache, use_cache=True, **arguments)
        logits_TV: Tensor = output.logits[0, -keep:].float().cpu()
        if not torch.isfinite(logits_TV).all():
            raise EngineError("the model's logits are not finite")
        return logits_TV

    def _prefill_tokens(self, scoring: bool) -> int:
        if not scoring:
            return PREFILL_TOKENS
        return max(16, min(PREFILL_TOKENS, SCORED_LOGITS // self._vocab_size))


def _chunks(length: int, size: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, length, size):
        yield begin, min(begin + size, length)


class _TokenWriter:
    """Turns the tokens of one sequence into events: text to show, offsets, scores."""

    def __init__(self, vocabulary: Vocabulary, request: SequenceRequest) -> None:
        self._vocabulary = vocabulary
        self._index = request.index
        self._text = vocabulary.detokenizer(() if request.sampling.echo else request.prompt)
        self._stop = StopStrings(request.sampling.stop)
        self._offset = 0

    @property
    def stopped(self) -> bool:
        return self._stop.hit

    def prompt_token(self, token: int, token_score: Score | None) -> Token:
        text = self._text.push(token)
        return self._event(token, token_score, text, len(text))

    def sampled_token(self, token: int, token_score: Score | None, *, silent: bool) -> Token:
        """``silent`` for a token that ends the text, whether or not the tokenizer calls it special."""
        text = "" if silent else self._text.push(token)
        return self._event(token, token_score, self._stop.push(text), len(text))

    def finish(self, reason: FinishReason, num_tokens: int) -> Finished:
        rest = "" if self._stop.hit else self._stop.push(self._text.flush())
        if not self._stop.hit:
            rest += self._stop.flush()
        return Finished(self._index, reason, rest, num_tokens)

    def _event(self, token: int, token_score: Score | None, shown: str, num_characters: int) -> Token:
        top = None
        if token_score is not None:
            top = tuple(
                Alternative(self._vocabulary.piece(id), self._vocabulary.raw(id), logprob)
                for id, logprob in token_score.top
            )
        event = Token(
            index=self._index,
            text=shown,
            piece=self._vocabulary.piece(token),
            raw=self._vocabulary.raw(token),
            offset=self._offset,
            logprob=None if token_score is None else token_score.logprob,
            top=top,
        )
        self._offset += num_characters
        return event
