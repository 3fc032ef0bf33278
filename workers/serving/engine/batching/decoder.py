"""The decoder port of the transformers engine. A decoder is a thread or a process."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.serving.engine.port import SequenceRequest, Sink


@dataclass(frozen=True, slots=True)
class DecoderStatus:
    """The decoder's part of ``EngineStatus``."""

    alive: bool
    stalled_seconds: float
    longest_step_seconds: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class DecoderLimits:
    """At most ``num_slots`` sequences at once, each of at most ``slot_tokens`` tokens."""

    num_slots: int
    slot_tokens: int
    vocab_size: int


class Decoder(Protocol):
    """Decodes the sequences that the engine has admitted."""

    @property
    def limits(self) -> DecoderLimits: ...

    def status(self) -> DecoderStatus: ...

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        """Start all sequences as slots become free.

        Returns a function that cancels them. Raises EngineError once closed.
        """
        ...

    def close(self) -> None:
        """See ``Engine.close``."""
        ...
