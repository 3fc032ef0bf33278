"""A stand-in for the part of vLLM that our engine uses, after the documentation of vLLM 0.33.0.

Names, fields, defaults, validation and the delivery of outputs in deltas are vLLM's. The tokens come from the
export on transformers and from our sampler, so that both engines can be compared token by token; vLLM's
sampler draws other tokens for the same seed.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, TypedDict

import pytest
import torch
from transformers import AutoModelForCausalLM

from workers.serving.engine.batching.sampler import Sampler, sample
from workers.serving.generation import Sampling


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class TokensInput(TypedDict):
    type: str
    prompt_token_ids: list[int]


def tokens_input(prompt_token_ids: list[int]) -> TokensInput:
    return TokensInput(type="token", prompt_token_ids=prompt_token_ids)


@dataclass
class AsyncEngineArgs:
    model: str = "Qwen/Qwen3-0.6B"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    load_format: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.92
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    generation_config: str = "auto"
    disable_log_stats: bool = False


@dataclass
class SamplingParams:
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        allowed = {
            "max_tokens": self.max_tokens is None or self.max_tokens >= 1,
            "temperature": 0.0 <= self.temperature <= 2.0,
            "top_p": 0.0 < self.top_p <= 1.0,
            "seed": self.seed is None or -(2**63) <= self.seed < 2**63,  # the width of its seeds
            "frequency_penalty": -2.0 <= self.frequency_penalty <= 2.0,
            "presence_penalty": -2.0 <= self.presence_penalty <= 2.0,
            "allowed_token_ids": self.allowed_token_ids is None or bool(self.allowed_token_ids),
        }
        for name, holds in allowed.items():
            if not holds:
                raise ValueError(f"{name}: {getattr(self, name)}")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool


class EngineDeadError(Exception):
    pass


class EngineGenerateError(Exception):
    pass


@dataclass(eq=False)
class AsyncLLMEngine:
    """Runs one task per request and at most ``max_num_seqs`` at once.

    ``dies`` simulates the end of the engine's process, ``fails`` an unexpected exception in ``generate``.
    """

    args: AsyncEngineArgs
    aborted: list[str] = field(default_factory=list)
    fails: Exception | None = None
    dies: bool = False
    is_shut_down: bool = False

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs) -> "AsyncLLMEngine":
        asyncio.get_running_loop()  # vLLM starts its output handler only inside a running loop
        engine = cls(engine_args)
        engine._model = AutoModelForCausalLM.from_pretrained(engine_args.model).eval()
        engine._slots = asyncio.Semaphore(engine_args.max_num_seqs or 256)
        engine.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_size_tokens=4096))
        engines.append(engine)
        return engine

    _model: Any = None
    _slots: Any = None
    vllm_config: Any = None

    @property
    def errored(self) -> bool:
        return self.dies

    def shutdown(self, timeout: float | None = None) -> None:
        self.is_shut_down = True

    async def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    async def generate(
        self, prompt: TokensInput, sampling_params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        tokens = list(prompt["prompt_token_ids"])
        assert self.args.max_model_len is not None
        if not 0 < len(tokens) < self.args.max_model_len:
            raise ValueError(f"a prompt of {len(tokens)} tokens")
        named = (
            sampling_params.stop_token_ids,
            sampling_params.logit_bias,
            sampling_params.allowed_token_ids,
        )
        if any(id >= self._model.config.vocab_size for ids in named for id in ids or ()):
            raise ValueError("token ids outside the vocabulary")
        try:
            async with self._slots:
                async for output in self._outputs(tokens, sampling_params, request_id):
                    if self.fails is not None:
                        raise self.fails
                    yield output
        except (asyncio.CancelledError, GeneratorExit):
            await self.abort(request_id)
            raise
        except EngineDeadError:
            raise
        except Exception as error:
            raise EngineGenerateError from error

    async def _outputs(
        self, tokens: list[int], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        sampler = _sampler(params)
        prompt_logprobs, fresh, num_sampled = None, [], 0
        while True:
            await asyncio.sleep(0.002)
            if self.dies:
                raise EngineDeadError("EngineCore encountered an issue.")
            with torch.inference_mode():
                logits_TV = self._model(torch.tensor([tokens])).logits[0].float()
            if num_sampled == 0 and params.prompt_logprobs is not None:
                rows = zip(tokens[1:], logits_TV[:-1], strict=True)
                prompt_logprobs = [None, *(_logprobs(row, t, params.prompt_logprobs) for t, row in rows)]
            token = _sample(logits_TV[-1], params, sampler)
            tokens.append(token)
            num_sampled += 1
            scored = None if params.logprobs is None else _logprobs(logits_TV[-1], token, params.logprobs)
            fresh.append((token, scored))
            reason = None
            if token in (params.stop_token_ids or ()):
                reason = "stop"
            elif num_sampled == params.max_tokens or len(tokens) == self.args.max_model_len:
                reason = "length"
            # Like vLLM with a slow consumer, some deltas hold several tokens.
            if reason is None and num_sampled % 3 == 2:
                continue
            ids, logprobs = [token for token, _ in fresh], [s for _, s in fresh if s is not None]
            fresh = []
            completion = CompletionOutput(0, "", ids, logprobs or None, reason)
            yield RequestOutput(request_id, prompt_logprobs, [completion], reason is not None)
            prompt_logprobs = [] if params.prompt_logprobs is not None else None
            if reason is not None:
                return


engines: list[AsyncLLMEngine] = []
"""All engines, oldest first."""


def _sampler(params: SamplingParams) -> Sampler:
    sampling = Sampling(
        params.max_tokens,
        params.temperature,
        params.top_p,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        logit_bias=tuple((params.logit_bias or {}).items()),
    )
    return Sampler(sampling, params.seed or 0)


def _sample(logits_V: torch.Tensor, params: SamplingParams, sampler: Sampler) -> int:
    if params.allowed_token_ids is not None:
        masked_V = torch.full_like(logits_V, float("-inf"))
        masked_V[params.allowed_token_ids] = logits_V[params.allowed_token_ids]
        logits_V = masked_V
    [token] = sample(logits_V[None], [sampler])
    return 0 if token is None else token  # vLLM does not check for logits that are not finite


def _logprobs(logits_V: torch.Tensor, token: int, num_top: int) -> dict[int, Logprob]:
    """The token's own entry, then the most likely tokens."""
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    own = float(logprobs_V[token])
    entries = {token: Logprob(own, int((logprobs_V >= own).sum()))}
    values, ids = logprobs_V.topk(num_top)
    for rank, (id, value) in enumerate(zip(ids.tolist(), values.tolist(), strict=True), start=1):
        entries[id] = Logprob(value, rank)
    return entries


def install(patch: pytest.MonkeyPatch) -> None:
    """Make ``import vllm`` find this module's classes."""
    engines.clear()
    modules: Mapping[str, Mapping[str, Any]] = {
        "vllm": {
            "AsyncEngineArgs": AsyncEngineArgs,
            "AsyncLLMEngine": AsyncLLMEngine,
            "SamplingParams": SamplingParams,
        },
        "vllm.inputs": {"tokens_input": tokens_input},
        "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(contents)
        patch.setitem(sys.modules, name, module)
