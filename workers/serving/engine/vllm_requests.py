"""Our requests in vLLM's words, and its answers in ours. Nothing here needs vLLM.

Text, stop strings, offsets and end tokens stay ours: vLLM is given token ids and gives token ids back.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workers.serving.engine.detokenizer import Vocabulary
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import NOT_FINITE, EngineError, EngineEvent, SequenceRequest
from workers.serving.engine.sampling import GREEDY_BELOW, LEAST_LOGPROB, Score
from workers.serving.engine.token_writer import TokenWriter
from workers.serving.generation import Finished, FinishReason

Logprobs = Mapping[int, Any]  # vLLM's Logprob by token id

_SEED_MASK = (1 << 63) - 1  # vLLM keeps seeds in signed 64 bits


def engine_arguments(
    folder: Path, options: EngineOptions, *, context_length: int, cache_bytes: int, memory_share: float
) -> dict[str, Any]:
    """Of ``AsyncEngineArgs``. ``memory_share`` is what must be free of the device when it starts; with ``cache_bytes`` given
    it bounds nothing else, so that another version can be loaded beside this one.
    """
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "max_model_len": context_length,
        "max_num_seqs": options.max_slots,
        "kv_cache_memory_bytes": cache_bytes,
        "gpu_memory_utilization": memory_share,
        "max_logprobs": -1,  # no other bound than the API's
        "logprobs_mode": "raw_logprobs",  # the model's own distribution, as the other engine scores
        "generation_config": "vllm",  # what an export says of sampling is not what a request says
        "disable_log_stats": True,
    }


def prompt_tokens(request: SequenceRequest) -> list[int]:
    """What vLLM is given to read. It always samples a token; where none is wanted, that is the prompt's last."""
    return list(request.prompt if request.max_tokens else request.prompt[:-1])


def sampling_arguments(request: SequenceRequest, end_tokens: frozenset[int]) -> dict[str, Any]:
    """Of ``SamplingParams``, all but the kind of output. Every token is scored: it is how one learns that logits are not
    finite.
    """
    sampling = request.sampling
    arguments: dict[str, Any] = {
        "logprobs": sampling.num_logprobs or 0,
        "prompt_logprobs": sampling.num_logprobs if sampling.echo else None,
        "detokenize": False,
        "ignore_eos": True,  # what ends a text is in stop_token_ids
    }
    if request.max_tokens == 0:
        return arguments | {"max_tokens": 1, "temperature": 0.0, "allowed_token_ids": [request.prompt[-1]]}
    # No top_p of 0 there: the likeliest token is what that leaves.
    greedy = sampling.temperature < GREEDY_BELOW or sampling.top_p == 0.0
    return arguments | {
        "max_tokens": request.max_tokens,
        "temperature": 0.0 if greedy else sampling.temperature,
        "top_p": 1.0 if greedy else sampling.top_p,
        "seed": request.seed & _SEED_MASK,
        "stop_token_ids": [] if request.endless else sorted(end_tokens),
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "logit_bias": dict(sampling.logit_bias) or None,
    }


class SequenceAnswer:
    """One sequence's outputs as events. ``over`` once it needs no more of them."""

    def __init__(self, request: SequenceRequest, vocabulary: Vocabulary, end_tokens: frozenset[int]) -> None:
        self._request = request
        self._end_tokens = end_tokens
        self._writer = TokenWriter(vocabulary, request)
        self._begun = False
        self._num_sampled = 0
        self.over = False

    @property
    def needs_no_model(self) -> bool:
        """Whether nothing is to be sampled or scored."""
        sampling = self._request.sampling
        scores = sampling.echo and sampling.num_logprobs is not None and len(self._request.prompt) > 1
        return self._request.max_tokens == 0 and not scores

    @property
    def num_tokens(self) -> int:
        """Prompt and continuation so far; 0 before the first output."""
        return len(self._request.prompt) + self._num_sampled if self._begun else 0

    def without_model(self) -> list[EngineEvent]:
        return [*self._echo(self._request.prompt, [None]), self._finish(FinishReason.LENGTH)]

    def take(self, output: Any) -> list[EngineEvent]:
        """What a ``RequestOutput`` of the kind DELTA adds. Raises EngineError where the sequence cannot go on."""
        events: list[EngineEvent] = []
        if not self._begun:
            self._begun = True
            # The scores of the whole prompt come with the first output.
            events += self._echo(prompt_tokens(self._request), output.prompt_logprobs)
        [completion] = output.outputs
        for token, logprobs in zip(completion.token_ids, completion.logprobs or (), strict=True):
            events += self._take(token, logprobs)
            if self.over:
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

    def _take(self, token: int, logprobs: Logprobs) -> list[EngineEvent]:
        if self._request.max_tokens == 0:
            last = self._request.prompt[-1]
            event = self._writer.prompt_token(last, self._score(last, logprobs))
            return [event, self._finish(FinishReason.LENGTH)]
        score = self._score(token, logprobs)
        if score.logprob == LEAST_LOGPROB:  # it is what was chosen
            raise EngineError(NOT_FINITE)
        self._num_sampled += 1
        ends = token in self._end_tokens and not self._request.endless
        asked = self._request.sampling.num_logprobs is not None
        event = self._writer.sampled_token(token, score if asked else None, silent=ends)
        if ends or self._writer.stopped:
            return [event, self._finish(FinishReason.STOP)]
        if self._num_sampled == self._request.max_tokens:
            return [event, self._finish(FinishReason.LENGTH)]
        return [event]

    def _finish(self, reason: FinishReason) -> Finished:
        self.over = True
        return self._writer.finish(reason, self._num_sampled)

    def _score(self, token: int, logprobs: Logprobs) -> Score:
        """Of ``{id: Logprob}``: the token's own is there whether or not it is among the likeliest. Raises EngineError where it is
        no number.
        """
        if math.isnan(logprobs[token].logprob):
            raise EngineError(NOT_FINITE)
        top: list[tuple[int, float]] = []
        if self._request.sampling.num_logprobs:
            ranked = sorted(logprobs.items(), key=lambda scored: scored[1].rank)
            top = [(id, max(each.logprob, LEAST_LOGPROB)) for id, each in ranked]
        return Score(max(logprobs[token].logprob, LEAST_LOGPROB), top)
