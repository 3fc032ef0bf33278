"""The engine port: the interface of anything that runs a model version. ``loader`` picks the implementation.

An engine decodes several sequences at once. It takes all sequences of a request together and calls ``sink``
from its own thread, in order within each sequence. How it batches them is up to the engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from workers.serving.generation import Chat, Finished, Sampling, Token

NOT_FINITE = "the model's logits are not finite"
CLOSED = "the engine was closed"


class EngineError(Exception):
    """The engine cannot continue a sequence, e.g. because its logits are not finite."""


class QueueFull(Exception):
    """Too many sequences are waiting, so the engine rejected the whole request.

    Retry after ``retry_seconds``.
    """

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One prompt to continue.

    ``max_tokens`` fits into the context; ``seed`` is for this sequence only. ``endless``: ignore end tokens until
    ``max_tokens``.
    """

    index: int
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    sampling: Sampling
    endless: bool = False


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    """The last event of a sequence that the engine could not finish."""

    index: int
    message: str


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot of an engine's health and load.

    ``stalled_seconds`` is the age of the current engine step, 0 while the engine is idle;
    ``longest_step_seconds`` shows what is usual. The KV cache holds ``cached_tokens`` of at most
    ``cache_tokens``.
    """

    alive: bool
    stalled_seconds: float
    longest_step_seconds: float
    num_running: int
    num_waiting: int
    cached_tokens: int
    cache_tokens: int


EngineEvent = Token | Finished | SequenceFailed
Sink = Callable[[list[EngineEvent]], None]


def num_ended(events: Sequence[EngineEvent]) -> int:
    """Number of sequences that end with these events, each with ``Finished`` or ``SequenceFailed``."""
    return sum(not isinstance(event, Token) for event in events)


class Engine(Protocol):
    """Runs one model version."""

    @property
    def context_length(self) -> int:
        """Maximum number of tokens in a sequence, prompt and continuation together."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def status(self) -> EngineStatus: ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, never empty.

        A text far longer than the context may be cut off beyond the context.
        """
        ...

    def encode_chat(self, chat: Chat) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Token ids of a conversation up to the assistant's turn, and the stop strings that end that turn.

        Raises ValueError if the chat template rejects the conversation.
        """
        ...

    def check_room(self) -> None:
        """Raise QueueFull if ``submit`` would. Callers check this before they do any work for a request."""
        ...

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        """Start all sequences, or raise QueueFull.

        Returns a function that cancels them and may be called repeatedly.
        """
        ...

    def close(self) -> None:
        """Stop and fail the sequences in flight. Returns without waiting."""
        ...


class EngineLoader(Protocol):
    """Loads exported folders as engines that share the memory of one device."""

    def needed_bytes(self, folder: Path) -> int:
        """Upper bound of an engine's memory. Raises OSError or ValueError if the folder is not an export."""
        ...

    def free_bytes(self) -> int:
        """Free memory of the device."""
        ...

    def load(self, folder: Path, seconds: float) -> Engine:
        """Load an engine.

        Raises OSError or ValueError if the folder is not an export, EngineError if the model cannot generate,
        and TimeoutError if the engine's process is not ready after ``seconds``; the process is then killed.
        """
        ...
