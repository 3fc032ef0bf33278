"""The requests that replicas answer and the items of their answers: plain data without HTTP, Ray or torch.

The same values travel within one process and over Ray. One request may ask for many sequences (several
prompts, ``n`` choices each); every item of the answer names its sequence by ``index``.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

VERSION_SEPARATOR = "@"
MAX_RETRY_SECONDS = 30
MAX_VERSION_DIGITS = 9


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-text token or a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to continue a prompt. ``temperature=0`` is greedy; ``max_tokens=None`` fills the context."""

    max_tokens: int | None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    num_logprobs: int | None = None  # None: no log-probabilities at all; 0: only those of the chosen tokens
    echo: bool = False  # return the prompt's tokens first
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id and what is added to its logit


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    messages: tuple[ChatMessage, ...]


Prompt = str | tuple[int, ...] | Chat


@dataclass(frozen=True, slots=True)
class Generation:
    """One request. ``stream`` only says whether the caller wants the items as they come or all at once.

    ``best_of``: decode this many sequences for every prompt and return the ``n`` likeliest (not with
    ``stream``); None returns all ``n``. ``version``: a loaded version to use instead of the served one.
    ``affinity``: during a trial, requests with the same affinity go to the same version.
    """

    model: str
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    n: int = 1
    stream: bool = False
    version: int | None = None
    affinity: str | None = None
    best_of: int | None = None

    @property
    def num_candidates(self) -> int:
        """Number of sequences decoded for each prompt."""
        return self.n if self.best_of is None else self.best_of


@dataclass(frozen=True, slots=True)
class Started:
    """First item of every answer that is not a rejection: the number of the version that generates all of it."""

    number: int
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have been chosen: its text, its exact bytes, its log-probability in nats."""

    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token. ``piece`` is the token's own text. ``text`` is what may be shown now: whole characters, and
    no part of a stop string. ``offset`` counts the characters of the sequence before it. ``top`` is None for
    the first token of a prompt, which nothing precedes, and where the request asked for no log-probabilities.
    """

    index: int
    text: str
    piece: str
    raw: bytes
    offset: int
    logprob: float | None
    top: tuple[Alternative, ...] | None

    def __reduce__(self) -> tuple[type["Token"], tuple[object, ...]]:
        # Every token crosses processes; the default pickling of slotted dataclasses takes six times as long.
        return Token, (self.index, self.text, self.piece, self.raw, self.offset, self.logprob, self.top)


@dataclass(frozen=True, slots=True)
class Finished:
    """Last item of a sequence. ``text`` was held back until now; ``num_tokens`` counts the sampled tokens."""

    index: int
    reason: FinishReason
    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class RequestRejected:
    """The request, or the rest of its answer, fails with an HTTP status and OpenAI's four error fields."""

    status: int
    message: str
    type: str
    code: str | None = None
    param: str | None = None
    retry_after_seconds: int | None = None


# Kept through 0.3: replicas started by 0.2 pickle their rejections under this name.
Refused = RequestRejected


@dataclass(frozen=True, slots=True)
class Discarded:
    """Tokens sampled for ``best_of`` candidates that are not returned; the usage counts them."""

    num_tokens: int


AnswerItem = Started | Token | Finished | Discarded | RequestRejected


class RejectionError(Exception):
    """Raised to reject a request; carries the item that the client gets."""

    def __init__(self, rejection: RequestRejected) -> None:
        super().__init__(rejection.message)
        self.rejection = rejection


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> RejectionError:
    return RejectionError(RequestRejected(400, message, "invalid_request_error", code, param))


def not_ready(message: str, *, retry_after_seconds: int = 5) -> RejectionError:
    return RejectionError(
        RequestRejected(503, message, "server_error", "model_not_ready", "model", retry_after_seconds)
    )


def overloaded(message: str, retry_seconds: float = 1.0) -> RejectionError:
    seconds = min(max(math.ceil(retry_seconds), 1), MAX_RETRY_SECONDS)
    return RejectionError(
        RequestRejected(429, message, "rate_limit_error", "rate_limit_exceeded", None, seconds)
    )


def failed(message: str) -> RejectionError:
    return RejectionError(RequestRejected(500, message, "server_error", "engine_error"))


def unknown_model(model: str) -> RejectionError:
    message = f"The model `{model}` does not exist"
    return RejectionError(RequestRejected(404, message, "invalid_request_error", "model_not_found", "model"))


def unknown_version(model: str, number: int, loaded: Collection[int]) -> RejectionError:
    numbers = ", ".join(str(other) for other in loaded) or "none"
    message = f"Version {number} of the model `{model}` is not loaded; loaded versions: {numbers}"
    return RejectionError(RequestRejected(404, message, "invalid_request_error", "model_not_found", "model"))


def versioned_name(model: str, number: int) -> str:
    """Return ``digitalgov@3``, a model id and also the ``system_fingerprint`` of answers."""
    return f"{model}{VERSION_SEPARATOR}{number}"


def parse_model_name(name: str) -> tuple[str, int | None]:
    """Split ``digitalgov@3`` into model and version; ``digitalgov`` names the served version (None)."""
    model, separator, number = name.rpartition(VERSION_SEPARATOR)
    if separator and number.isascii() and number.isdigit() and len(number) <= MAX_VERSION_DIGITS:
        return model, int(number)
    return name, None
