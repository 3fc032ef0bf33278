"""From a request to the sequences an engine decodes: prompts encoded, limits checked, seeds dealt."""

import secrets
from collections.abc import Sequence
from dataclasses import replace

from workers.serving.engine.port import Engine, SequenceRequest
from workers.serving.generation import Chat, Generation, Prompt, invalid

MAX_SEQUENCES = 512  # of one request: no more than the engine lets wait
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that the choices of one request never share a seed
_SEED_RANGE = 1 << 64


def plan_sequences(request: Generation, engine: Engine) -> tuple[list[SequenceRequest], int]:
    """Sequences of every prompt's candidates, prompts first as OpenAI numbers them, and the prompts' token count.

    Raises RequestRefused (400) where the engine cannot serve the request.
    """
    if len(request.prompts) * request.num_candidates > MAX_SEQUENCES:
        param = "n" if request.best_of is None else "best_of"
        prompts = f"{len(request.prompts)} prompts with {param}={request.num_candidates}"
        raise invalid(f"{prompts} exceed {MAX_SEQUENCES} choices", param=param)
    biased = [token for token, _ in request.sampling.logit_bias if token >= engine.vocab_size]
    if biased:
        message = f"Token id {biased[0]} is outside the vocabulary of {engine.vocab_size}"
        raise invalid(message, param="logit_bias")
    asked = request.sampling
    if request.best_of is not None and asked.num_logprobs is None:
        asked = replace(asked, num_logprobs=0)  # to choose by
    seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(64)
    sequences: list[SequenceRequest] = []
    num_prompt_tokens = 0
    for prompt in request.prompts:
        ids, stop = _encode(prompt, engine)
        num_prompt_tokens += len(ids)
        sampling = replace(asked, stop=asked.stop + stop)
        param = "messages" if isinstance(prompt, Chat) else "prompt"
        max_tokens = _max_tokens(len(ids), request.sampling.max_tokens, engine.context_length, param)
        for _ in range(request.num_candidates):
            index = len(sequences)
            own_seed = (seed + index * _SEED_STEP) % _SEED_RANGE
            sequences.append(SequenceRequest(index, ids, max_tokens, own_seed, sampling))
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
    except UnicodeEncodeError as error:  # JSON's escapes may be halves of characters
        raise invalid(f"Invalid value for '{param}': {error.reason} at {error.start}", param=param) from error


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        raise invalid("A prompt of token ids must not be empty", param="prompt")
    outside = next((id for id in ids if not 0 <= id < vocab_size), None)
    if outside is not None:
        raise invalid(f"Token id {outside} is outside the vocabulary of {vocab_size}", param="prompt")


def _max_tokens(num_prompt_tokens: int, wanted: int | None, context_length: int, param: str) -> int:
    room = context_length - num_prompt_tokens
    if wanted is None:
        wanted = max(room, 1)  # so that a prompt that fills the context is refused, not answered with nothing
    if wanted > room:
        raise invalid(
            f"This model's maximum context length is {context_length} tokens. However, you requested "
            f"{num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the prompt, {wanted} in the "
            "completion).",
            param=param,
            code="context_length_exceeded",
        )
    return wanted
