"""Assigns sequences to slots so that prompts reuse the prefixes that slots hold.

A slot keeps the keys and values of the tokens fed to it after its sequence has ended, until another sequence
takes it. This module only does the bookkeeping; it holds no tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

MIN_COPIED = 16  # tokens; computing fewer takes no longer than copying them
MIN_AWAITED = 32  # tokens; computing fewer takes no longer than waiting for them


class SlotAssignment(NamedTuple):
    """A sequence's slot.

    The first ``num_held`` tokens of its prompt are there or must be copied from ``source``.
    """

    slot: int
    source: int
    num_held: int


@dataclass(slots=True)
class _Slot:
    held: list[int] = field(default_factory=list)
    prompt: Sequence[int] | None = None  # of the running sequence
    last_used: int = 0


class SlotTable:
    """Knows the tokens in every slot. ``reuses``: slots can be continued from a prefix and copied."""

    def __init__(self, num_slots: int, *, reuses: bool) -> None:
        self._slots = [_Slot() for _ in range(num_slots)]
        self._reuses = reuses
        self._num_uses = 0

    @property
    def num_held(self) -> int:
        """Number of tokens in the KV cache, of running and past sequences."""
        return sum(len(slot.held) for slot in self._slots)

    def any_free(self) -> bool:
        return any(slot.prompt is None for slot in self._slots)

    def assign(self, prompt: Sequence[int], *, whole: bool) -> SlotAssignment | None:
        """Assign a free slot; there must be one. Returns None if the prompt should wait for a running prefill.

        At least the last prompt token is left to feed, because its logits start the continuation. If ``whole``,
        all tokens are.
        """
        source, num_held = (None, 0) if whole or not self._reuses else self._longest_prefix(prompt)
        if not whole and self._reuses and self._is_being_fed(prompt, num_held):
            return None
        free = [position for position, slot in enumerate(self._slots) if slot.prompt is None]
        # Least recently used first, then the lowest position: attention handles adjacent slots together.
        target = min(free, key=lambda position: self._slots[position].last_used)
        if source is not None and source in free and 2 * num_held >= len(self._slots[source].held):
            target = source  # the prompt uses most of what that slot holds
        elif source is None or num_held < MIN_COPIED:
            source, num_held = None, 0
        slot = self._slots[target]
        slot.held = list(prompt[:num_held])
        slot.prompt = prompt
        self._touch(slot)
        return SlotAssignment(target, target if source is None else source, num_held)

    def feed(self, position: int, tokens: Sequence[int]) -> None:
        """Record tokens fed to a slot."""
        self._slots[position].held.extend(tokens)

    def release(self, position: int, *, discard: bool = False) -> None:
        """Free a slot whose sequence has ended. ``discard``: its contents must not be reused."""
        slot = self._slots[position]
        slot.prompt = None
        if discard:
            slot.held = []
        self._touch(slot)

    def _longest_prefix(self, prompt: Sequence[int]) -> tuple[int | None, int]:
        """The slot that holds the longest prefix of the prompt, and the prefix's length."""
        best: tuple[int | None, int] = (None, 0)
        for position, slot in enumerate(self._slots):
            num_held = min(_num_shared(slot.held, prompt), len(prompt) - 1)
            if num_held > best[1]:
                best = (position, num_held)
        return best

    def _is_being_fed(self, prompt: Sequence[int], num_held: int) -> bool:
        """Whether a running prefill will soon provide a longer prefix that is worth waiting for."""
        return any(
            slot.prompt is not None
            and len(slot.held) < len(slot.prompt)
            and min(_num_shared(slot.prompt, prompt), len(prompt) - 1) >= num_held + MIN_AWAITED
            for slot in self._slots
        )

    def _touch(self, slot: _Slot) -> None:
        self._num_uses += 1
        slot.last_used = self._num_uses


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    length = min(len(one), len(other))
    if list(one[:length]) == list(other[:length]):
        return length
    return next(position for position in range(length) if one[position] != other[position])
