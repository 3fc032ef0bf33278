"""The model runner port: runs chunks of many sequences in one call, with a KV cache in slots."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Part of a prompt, or the one token sampled last, for a slot that holds ``begin`` tokens.

    The runner returns the logits of the last ``num_logits`` tokens.
    """

    slot: int
    begin: int
    tokens: Sequence[int]
    num_logits: int


class ModelRunner(Protocol):
    """Runs a model whose KV cache lies in ``num_slots`` slots."""

    @property
    def num_slots(self) -> int: ...

    @property
    def slot_tokens(self) -> int:
        """Maximum number of tokens in a slot."""
        ...

    @property
    def reuses(self) -> bool:
        """Whether a chunk may begin at any token its slot has held before, and ``copy`` works."""
        ...

    def __call__(self, chunks: Sequence[PrefillChunk]) -> Tensor:
        """Logits of shape (sum of num_logits, V) in the order of the chunks, float32 on the CPU.

        A chunk that begins at 0 starts its slot afresh.
        """
        ...

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first ``num_tokens`` of slot ``source`` to slot ``target``. Only allowed if ``reuses``."""
        ...

    def clear(self, slot: int) -> None:
        """Zero a slot whose contents may not be finite, so that they cannot reach another sequence."""
        ...
