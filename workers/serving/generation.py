"""What is asked of a replica and what it answers: plain data that crosses from the HTTP side to an engine.

The same values travel inside one process and over Ray, so nothing here knows HTTP, Ray or torch. One request
may ask for many sequences (several prompts, ``n`` choices each); every item of the answer names its sequence
by ``index``.
"""

import math
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from prometheus_client import Metric

FINGERPRINT_SEPARATOR = "@"
MAX_RETRY_SECONDS = 30
MAX_DIGITS = 9  # of a version's number


class FinishReason(StrEnum):
    STOP = "stop"  # an end-of-text token or a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to continue a prompt. ``temperature`` 0 is greedy; ``max_tokens`` None goes on to the end of the
    context.
    """

    max_tokens: int | None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    num_logprobs: int | None = None  # None: no log-probabilities at all; 0: only those of the chosen tokens
    echo: bool = False  # answer with the prompt's tokens first
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

    ``best_of``: so many sequences are decoded for every prompt, and the ``n`` likeliest of them answered; not with
    ``stream``. None: ``n``, all of them.

    ``version``: one that is loaded, instead of the served one. ``affinity``: requests of the same are answered by the same
    version while another is tried.
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
        """Sequences of every prompt."""
        return self.n if self.best_of is None else self.best_of


@dataclass(frozen=True, slots=True)
class Started:
    """First item of every answer that is not a refusal: the version it comes from, all of it."""

    number: int
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that could have been chosen: how it reads, its exact bytes, its log-probability in nats."""

    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token. ``text`` is what may be shown now (whole characters, no part of a stop string), often not
    the token's own text; ``offset`` counts the characters of the sequence before it. ``top`` is None where
    nothing precedes the token (the first of a prompt) or no log-probabilities were asked for.
    """

    index: int
    text: str
    piece: str
    raw: bytes
    offset: int
    logprob: float | None
    top: tuple[Alternative, ...] | None

    def __reduce__(self) -> tuple[type["Token"], tuple[object, ...]]:
        # Every token crosses processes: what dataclasses with slots are given to be pickled takes six times as long.
        return Token, (self.index, self.text, self.piece, self.raw, self.offset, self.logprob, self.top)


@dataclass(frozen=True, slots=True)
class Finished:
    """Last item of a sequence; ``text`` had been held back; ``num_tokens`` counts the sampled tokens."""

    index: int
    reason: FinishReason
    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The request, or what is left of it, fails: an HTTP status and OpenAI's four error fields."""

    status: int
    message: str
    type: str
    code: str | None = None
    param: str | None = None
    retry_after_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Discarded:
    """Tokens that were sampled for candidates which are not among the choices: the usage counts them."""

    num_tokens: int


Answer = Started | Token | Finished | Discarded | Refused


class RequestRefused(Exception):
    """Carries a refusal up to where it is answered."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.message)
        self.refused = refused


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> RequestRefused:
    return RequestRefused(Refused(400, message, "invalid_request_error", code, param))


def not_ready(message: str, *, retry_after_seconds: int = 5) -> RequestRefused:
    return RequestRefused(
        Refused(503, message, "server_error", "model_not_ready", "model", retry_after_seconds)
    )


def overloaded(message: str, retry_seconds: float = 1.0) -> RequestRefused:
    seconds = min(max(math.ceil(retry_seconds), 1), MAX_RETRY_SECONDS)
    return RequestRefused(Refused(429, message, "rate_limit_error", "rate_limit_exceeded", None, seconds))


def failed(message: str) -> RequestRefused:
    return RequestRefused(Refused(500, message, "server_error", "engine_error"))


def unknown_model(model: str) -> RequestRefused:
    message = f"The model `{model}` does not exist"
    return RequestRefused(Refused(404, message, "invalid_request_error", "model_not_found", "model"))


def unknown_version(model: str, number: int, loaded: Collection[int]) -> RequestRefused:
    there = ", ".join(str(other) for other in loaded) or "none"
    message = f"Version {number} of the model `{model}` is not loaded; loaded are: {there}"
    return RequestRefused(Refused(404, message, "invalid_request_error", "model_not_found", "model"))


def fingerprint(model: str, number: int) -> str:
    """Name of a model version as answers carry it, e.g. ``digitalgov@3``."""
    return f"{model}{FINGERPRINT_SEPARATOR}{number}"


def named_version(name: str) -> tuple[str, int | None]:
    """The model and the version that a name asks for: of ``digitalgov@3`` the third, of ``digitalgov`` the served one."""
    model, separator, number = name.rpartition(FINGERPRINT_SEPARATOR)
    if separator and number.isascii() and number.isdigit() and len(number) <= MAX_DIGITS:
        return model, int(number)
    return name, None


@dataclass(frozen=True)
class Served:
    """A model that answers: with ``number``, and with each of ``loaded`` when it is asked for. None: nothing answers just now;
    one that sleeps will when it is asked.
    """

    number: int | None
    loaded: tuple[int, ...]


class Directory(Protocol):
    """Where the HTTP side finds models: in this process, or behind Ray Serve."""

    async def served(self) -> dict[str, Served]:
        """By model name, every model that answers or has."""
        ...

    async def metrics(self) -> list[Metric]:
        """Of every replica, in Prometheus' families."""
        ...

    def generate(self, request: Generation) -> AsyncGenerator[list[Answer], None]:
        """Answer in batches of items; nothing is raised for what can be said by a ``Refused`` item."""
        ...
