"""Translates engine options and requests to vLLM's arguments. Nothing here imports vLLM.

vLLM receives and returns token ids only. Text, stop strings, offsets and end tokens are handled by our own
code.
"""

from pathlib import Path
from typing import Any

from workers.serving.engine.batching.sampler import MIN_TEMPERATURE
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import SequenceRequest

_SEED_MASK = (1 << 63) - 1  # vLLM keeps seeds as signed 64-bit integers


def engine_arguments(
    folder: Path, options: EngineOptions, *, context_length: int, cache_bytes: int, memory_share: float
) -> dict[str, Any]:
    """Arguments of ``AsyncEngineArgs``.

    ``memory_share`` of the device must be free when vLLM starts. Because ``cache_bytes`` is set, it limits
    nothing else, so another version can be loaded alongside this one.
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
        "max_logprobs": -1,  # the API sets the limit
        "logprobs_mode": "raw_logprobs",  # the model's own distribution, as in the transformers engine
        "generation_config": "vllm",  # requests, not the export, determine how to sample
        "disable_log_stats": True,
    }


def prompt_tokens(request: SequenceRequest) -> list[int]:
    """The prompt for vLLM, which always samples a token: with ``max_tokens`` 0, that is the prompt's last."""
    return list(request.prompt if request.max_tokens else request.prompt[:-1])


def sampling_arguments(request: SequenceRequest, end_tokens: frozenset[int]) -> dict[str, Any]:
    """Arguments of ``SamplingParams`` except the output kind.

    Every token is scored, because only the score reveals that logits are not finite.
    """
    sampling = request.sampling
    arguments: dict[str, Any] = {
        "logprobs": sampling.num_logprobs or 0,
        "prompt_logprobs": sampling.num_logprobs if sampling.echo else None,
        "detokenize": False,
        "ignore_eos": True,  # stop_token_ids lists the tokens that end a text
    }
    if request.max_tokens == 0:
        return arguments | {"max_tokens": 1, "temperature": 0.0, "allowed_token_ids": [request.prompt[-1]]}
    # vLLM rejects top_p 0, which leaves only the most likely token.
    greedy = sampling.temperature < MIN_TEMPERATURE or sampling.top_p == 0.0
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
