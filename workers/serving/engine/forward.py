"""The forward port: feeds pieces of many sequences to one model in a single call and remembers their past by slot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens to feed to a slot, of which ``begin`` tokens are fed already; logits of the last ``num_logits`` are wanted."""

    slot: int
    begin: int
    tokens: Sequence[int]
    num_logits: int


class Forward(Protocol):
    @property
    def num_slots(self) -> int: ...

    @property
    def slot_tokens(self) -> int:
        """Most tokens a slot can hold."""
        ...

    @property
    def reuses(self) -> bool:
        """Whether a piece may begin at any token that its slot has held before, and ``copy`` works."""
        ...

    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits, float32 on the CPU, shape (sum of num_logits, V), in the order of the pieces. Pieces that begin
        at 0 start their slots anew.
        """
        ...

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Have ``target`` hold what ``source`` does of its first ``num_tokens``. Only where it ``reuses``."""
        ...

    def clear(self, slot: int) -> None:
        """Forget what a slot holds, so that nothing of it (it may not be finite) can reach another sequence."""
        ...
