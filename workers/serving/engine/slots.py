"""Which sequence is in which slot, and what the slots still hold: a new prompt begins where an old one agrees.

A slot holds the keys and values of the tokens that were fed to it, and keeps them when its sequence is over, until
another takes it. Only bookkeeping: no tensors here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MIN_COPIED = 16  # tokens; fewer are computed as fast as they are copied
MIN_AWAITED = 32  # tokens; fewer are computed as fast as they are waited for


class Place(NamedTuple):
    """Where a sequence goes: ``num_held`` tokens of its prompt are there already, or come from slot ``source``."""

    slot: int
    source: int
    num_held: int


@dataclass(slots=True)
class _Slot:
    held: list[int] = field(default_factory=list)
    prompt: Sequence[int] | None = None  # of the sequence that is in it
    last_used: int = 0


class Slots:
    """``reuses``: whether what a slot holds can be gone on from, and copied to another."""

    def __init__(self, num_slots: int, *, reuses: bool) -> None:
        self._slots = [_Slot() for _ in range(num_slots)]
        self._reuses = reuses
        self._uses = 0

    @property
    def num_held(self) -> int:
        """Tokens whose keys and values are kept, of running sequences and of past ones."""
        return sum(len(slot.held) for slot in self._slots)

    def any_free(self) -> bool:
        return any(slot.prompt is None for slot in self._slots)

    def take(self, prompt: Sequence[int], *, whole: bool) -> Place | None:
        """A free slot for a prompt; None where it had better wait until another has computed what they share.

        There must be a free one. The last token of a prompt is always left to be fed, for its logits are what the
        continuation begins with; with ``whole`` all of them are.
        """
        source, num_held = (None, 0) if whole or not self._reuses else self._best(prompt)
        if not whole and self._reuses and self._is_coming(prompt, num_held):
            return None
        free = [position for position, slot in enumerate(self._slots) if slot.prompt is None]
        # Untouched slots before used ones, the longest unused first, the lowest of equals: neighbours are attended to together.
        target = min(free, key=lambda position: self._slots[position].last_used)
        if source is not None and source in free and 2 * num_held >= len(self._slots[source].held):
            target = source  # most of what it holds goes on being of use
        elif source is None or num_held < MIN_COPIED:
            source, num_held = None, 0
        slot = self._slots[target]
        slot.held = list(prompt[:num_held])
        slot.prompt = prompt
        self._touch(slot)
        return Place(target, target if source is None else source, num_held)

    def feed(self, position: int, tokens: Sequence[int]) -> None:
        self._slots[position].held.extend(tokens)

    def give_back(self, position: int, *, spoilt: bool = False) -> None:
        """The sequence is over. ``spoilt``: what is held must not be gone on from."""
        slot = self._slots[position]
        slot.prompt = None
        if spoilt:
            slot.held = []
        self._touch(slot)

    def _best(self, prompt: Sequence[int]) -> tuple[int | None, int]:
        best: tuple[int | None, int] = (None, 0)
        for position, slot in enumerate(self._slots):
            num_held = min(_num_shared(slot.held, prompt), len(prompt) - 1)
            if num_held > best[1]:
                best = (position, num_held)
        return best

    def _is_coming(self, prompt: Sequence[int], num_held: int) -> bool:
        return any(
            slot.prompt is not None
            and len(slot.held) < len(slot.prompt)
            and min(_num_shared(slot.prompt, prompt), len(prompt) - 1) >= num_held + MIN_AWAITED
            for slot in self._slots
        )

    def _touch(self, slot: _Slot) -> None:
        self._uses += 1
        slot.last_used = self._uses


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the beginning that both have."""
    length = min(len(one), len(other))
    if list(one[:length]) == list(other[:length]):
        return length
    return next(position for position in range(length) if one[position] != other[position])
