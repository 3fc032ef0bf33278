"""Turns a request into the sequences that an engine decodes: encodes prompts, checks limits, assigns seeds."""

import secrets
from collections.abc import Sequence
from dataclasses import replace

from workers.serving.engine.port import Engine, SequenceRequest
from workers.serving.generation import Chat, Generation, Prompt, invalid

MAX_SEQUENCES = 512  # per request
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that no two choices of a request share a seed
_SEED_RANGE = 1 << 64


def plan_sequences(request: Generation, engine: Engine) -> tuple[list[SequenceRequest], int]:
    """Return the sequences of all candidates, grouped by prompt, and the prompts' token count.

    Raises RejectionError (400) if the engine cannot serve the request.
    """
    if len(request.prompts) * request.num_candidates > MAX_SEQUENCES:
        param = "n" if request.best_of is None else "best_of"
        prompts = f"{len(request.prompts)} prompts with {param}={request.num_candidates}"
        raise invalid(f"{prompts} exceed {MAX_SEQUENCES} choices", param=param)
    biased = [token for token, _ in request.sampling.logit_bias if token >= engine.vocab_size]
    if biased:
        message = f"Token id {biased[0]} is outside the vocabulary of {engine.vocab_size}"
        raise invalid(message, param="logit_bias")
    common = request.sampling
    if request.best_of is not None and common.num_logprobs is None:
        common = replace(common, num_logprobs=0)  # candidates are ranked by them
    seed = common.seed if common.seed is not None else secrets.randbits(64)
    sequences: list[SequenceRequest] = []
    num_prompt_tokens = 0
    for prompt in request.prompts:
        ids, stop = _encode(prompt, engine)
        num_prompt_tokens += len(ids)
        sampling = replace(common, stop=common.stop + stop)
        param = "messages" if isinstance(prompt, Chat) else "prompt"
        max_tokens = _max_tokens(len(ids), common.max_tokens, engine.context_length, param)
        for _ in range(request.num_candidates):
            index = len(sequences)
            sequence_seed = (seed + index * _SEED_STEP) % _SEED_RANGE
            sequences.append(SequenceRequest(index, ids, max_tokens, sequence_seed, sampling))
    return sequences, num_prompt_tokens


def _encode(prompt: Prompt, engine: Engine) -> tuple[tuple[int, ...], tuple[str, ...]]:
    if isinstance(prompt, str):
        _check_text(prompt, param="prompt")
        return engine.encode(prompt), ()
    if isinstance(prompt, Chat):
        for message in prompt.messages:
            _check_text(message.content, param="messages")
        try:
            return engine.encode_chat(prompt)
        except ValueError as error:
            raise invalid(str(error), param="messages") from error
    _check_ids(prompt, engine.vocab_size)
    return prompt, ()


def _check_text(text: str, *, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON escapes may contain lone surrogates
        raise invalid(f"Invalid value for '{param}': {error.reason} at {error.start}", param=param) from error


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        raise invalid("A prompt of token ids must not be empty", param="prompt")
    outside = next((id for id in ids if not 0 <= id < vocab_size), None)
    if outside is not None:
        raise invalid(f"Token id {outside} is outside the vocabulary of {vocab_size}", param="prompt")


def _max_tokens(num_prompt_tokens: int, requested: int | None, context_length: int, param: str) -> int:
    available = context_length - num_prompt_tokens
    if requested is None:
        # A prompt that fills the context is rejected, not answered with nothing.
        requested = max(available, 1)
    if requested > available:
        raise invalid(
            f"This model's maximum context length is {context_length} tokens. However, you requested "
            f"{num_prompt_tokens + requested} tokens ({num_prompt_tokens} in the prompt, {requested} in the "
            "completion).",
            param=param,
            code="context_length_exceeded",
        )
    return requested
