"""The engine port: what runs one model version. ``loader`` chooses which.

An engine keeps several sequences in flight by itself. It is handed all sequences of a request at once and
calls ``sink`` from a thread of its own, in order for each sequence; how it batches them is its own matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from workers.serving.generation import Chat, Finished, Sampling, Token

NOT_FINITE = "the model's logits are not finite"
CLOSED = "the engine was closed"


class EngineError(Exception):
    """The engine cannot go on with a sequence, e.g. its logits are not finite."""


class QueueFull(Exception):
    """Too many sequences wait already; nothing of the request was taken. In ``retry_seconds`` there will be room for it."""

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One prompt to continue. ``max_tokens`` fits the context and ``seed`` is this sequence's own. ``endless``: no token ends it
    before those are there.
    """

    index: int
    prompt: tuple[int, ...]
    max_tokens: int
    seed: int
    sampling: Sampling
    endless: bool = False


@dataclass(frozen=True, slots=True)
class SequenceFailed:
    index: int
    message: str


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """``stalled_seconds``: how long it has been at one and the same turn; 0 while there is nothing to do. The longest turn
    so far says what is usual. ``cached_tokens`` of ``cache_tokens`` have their keys and values kept.
    """

    alive: bool
    stalled_seconds: float
    longest_turn_seconds: float
    num_running: int
    num_waiting: int
    cached_tokens: int
    cache_tokens: int


EngineEvent = Token | Finished | SequenceFailed
Sink = Callable[[list[EngineEvent]], None]


class Engine(Protocol):
    @property
    def context_length(self) -> int:
        """Most tokens a sequence may have, prompt and continuation together."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def status(self) -> EngineStatus: ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt; never empty. Of one that is far longer than the context, more than fit it may be all."""
        ...

    def encode_chat(self, chat: Chat) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Token ids of a conversation up to the assistant's turn, as ``encode`` gives them, and stop strings that end the
        turn. Raises ValueError.
        """
        ...

    def check_room(self) -> None:
        """Raises QueueFull where ``submit`` would now: before anything is done for a request."""
        ...

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        """Begin all of the sequences, or raise QueueFull. Returns what cancels them; cancelling twice is
        harmless.
        """
        ...

    def close(self) -> None:
        """Stop; sequences still in flight fail. Returns without waiting."""
        ...


class EngineLoader(Protocol):
    """Makes engines of exported folders, all in the memory of one device."""

    def needed_bytes(self, folder: Path) -> int:
        """What an engine of the folder takes at most. Raises OSError or ValueError for what is no export."""
        ...

    def free_bytes(self) -> int: ...

    def load(self, folder: Path, seconds: float) -> Engine:
        """Raises OSError or ValueError for what is no export, EngineError for a model that does not answer, and TimeoutError
        after ``seconds`` where a process is waited for, which is then ended.
        """
        ...
