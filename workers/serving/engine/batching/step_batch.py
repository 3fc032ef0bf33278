"""Lays the chunks of one engine step out as rows, and groups them for attention.

The tokens of all chunks lie end to end in one row, so that every layer but attention works on (1, T, …)
without padding. Attention runs group by group: adjacent slots with one token each form a group, and every
longer chunk is a group of its own.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.serving.engine.batching.model_runner import PrefillChunk

# Key lengths are rounded up to multiples of this, so that sums run in the same order when longer sequences share the batch.
LENGTH_STEP = 16
# Masked keys that cost as much as one more attention call. Estimated for 320 numbers a key on two cores, and
# for a GPU, where a call takes tens of microseconds and a thousand keys take hundreds of nanoseconds.
MAX_WASTED_KEYS = {"cpu": 64, "cuda": 1 << 15}


class AttentionGroup(NamedTuple):
    """Rows ``begin`` to ``end`` of a step: adjacent slots with one token each, or one slot with several."""

    begin: int
    end: int
    slots: slice
    length: int  # keys to attend to, a multiple of LENGTH_STEP


class StepBatch:
    """The rows of one step as tensors: tokens, slots, positions, and the rows whose logits are wanted."""

    def __init__(self, chunks: Sequence[PrefillChunk], device: torch.device, dtype: torch.dtype) -> None:
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for chunk in chunks:
            tokens += chunk.tokens
            slots += [chunk.slot] * len(chunk.tokens)
            positions += range(chunk.begin, chunk.begin + len(chunk.tokens))
            wanted += range(len(tokens) - chunk.num_logits, len(tokens))
        self.tokens_T, self.slots_T, self.positions_T, self.wanted_R = (
            torch.tensor(numbers, dtype=torch.long, device=device)
            for numbers in (tokens, slots, positions, wanted)
        )
        self.groups = list(_groups(chunks, MAX_WASTED_KEYS[device.type]))
        self._dtype = dtype
        self._full_masks: dict[int | None, Tensor] = {}  # by sliding window
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def mask(self, group: AttentionGroup, length: int, window: int | None) -> Tensor:
        """Additive attention mask of a group: (B, 1, 1, L) for B slots, or (1, 1, T, L) for one slot."""
        mask = self._masks.get((group.begin, window))
        if mask is None:
            if window not in self._full_masks:
                self._full_masks[window] = self._full_mask(window)
            mask_TL = self._full_masks[window][group.begin : group.end, :length]
            one_token_each = group.slots.stop - group.slots.start == group.end - group.begin
            mask = mask_TL[:, None, None] if one_token_each else mask_TL[None, None]
            self._masks[group.begin, window] = mask
        return mask

    def _full_mask(self, window: int | None) -> Tensor:
        """One mask for all groups, which takes a few calls instead of a few for each of up to 16 groups."""
        query_T1 = self.positions_T[:, None]
        key_L = torch.arange(max(group.length for group in self.groups), device=query_T1.device)
        hidden_TL = key_L > query_T1
        if window is not None:
            hidden_TL |= key_L <= query_T1 - window
        mask_TL = torch.zeros(hidden_TL.shape, dtype=self._dtype, device=query_T1.device)
        return mask_TL.masked_fill_(hidden_TL, float("-inf"))


def _groups(chunks: Sequence[PrefillChunk], max_wasted_keys: int) -> Iterator[AttentionGroup]:
    begin = 0
    members: list[PrefillChunk] = []
    for chunk in chunks:
        if members and not _fits(members, chunk, max_wasted_keys):
            yield _group(begin, members)
            begin += sum(len(member.tokens) for member in members)
            members = []
        members.append(chunk)
    if members:
        yield _group(begin, members)


def _fits(members: Sequence[PrefillChunk], chunk: PrefillChunk, max_wasted_keys: int) -> bool:
    """Whether the chunk should join the group.

    Joining makes the shorter sequences read masked keys up to the longest; staying out costs another call.
    """
    last = members[-1]
    if not len(last.tokens) == len(chunk.tokens) == 1 or chunk.slot != last.slot + 1:
        return False
    longest = max(member.begin for member in members)
    num_wasted = max(chunk.begin - longest, 0) * len(members) + max(longest - chunk.begin, 0)
    return num_wasted <= max_wasted_keys


def _group(begin: int, members: Sequence[PrefillChunk]) -> AttentionGroup:
    length = max(member.begin + len(member.tokens) for member in members)
    return AttentionGroup(
        begin,
        begin + sum(len(member.tokens) for member in members),
        slice(members[0].slot, members[-1].slot + 1),
        -(-length // LENGTH_STEP) * LENGTH_STEP,
    )
