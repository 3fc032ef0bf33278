"""What decodes for the default engine: in a thread of this process, or in a process of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.serving.engine.port import SequenceRequest, Sink


@dataclass(frozen=True, slots=True)
class DecodingStatus:
    """As ``EngineStatus``, which has beside it what is in flight."""

    alive: bool
    stalled_seconds: float
    longest_turn_seconds: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class DecodingSize:
    """At most ``num_slots`` sequences at once, each of at most ``slot_tokens`` tokens of a vocabulary of ``vocab_size``."""

    num_slots: int
    slot_tokens: int
    vocab_size: int


class Decoding(Protocol):
    @property
    def size(self) -> DecodingSize: ...

    def status(self) -> DecodingStatus: ...

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        """Begin all of the sequences, as soon as there are slots. Returns what cancels them. Raises EngineError once it is
        closed.
        """
        ...

    def close(self) -> None:
        """As ``Engine.close``."""
        ...
