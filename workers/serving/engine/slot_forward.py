"""Forward that feeds all sequences at once, over keys and values that stay in their slots.

The tokens of all pieces lie end to end in one row, so that every layer but attention works on (1, T, …) without
padding. Attention goes group by group: sequences that each feed one token and sit in neighbouring slots together,
every longer piece by itself. It is handed to the model through transformers' attention interface; whether a model
really takes it is tried, not looked up (``model_forward``).
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from workers.serving.engine.forward import Piece

ATTENTION = "pathswitch_slots"
LENGTH_STEP = (
    16  # keys are looked at in multiples of this: sums are then in the same order beside longer sequences
)
MOST_VIEWS = 256  # of a layer's slots, kept from one turn to the next
# As long to look at as a call of attention takes to begin: an estimate for 320 numbers a key on two cores, and on a GPU, where a
# call takes tens of microseconds and keys hundreds of nanoseconds a thousand.
KEYS_IN_VAIN = {"cpu": 64, "cuda": 1 << 15}


class SlotForward:
    """Owns the slots of one model, whose attention it replaces for good.

    Slots hold ``slot_tokens`` tokens each; layers' keys and values (``_Pool``) are of the model's own type. Memory is zeros from
    the start: what is masked must be finite.
    """

    reuses = True

    def __init__(self, model: Any, *, num_slots: int, slot_tokens: int) -> None:
        self._model = model
        self._device, self._dtype = model.device, model.dtype
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._pools: dict[int, _Pool] = {}
        self._layer_bytes: dict[int, int] = {}  # of one token
        self._rows = _Rows((), torch.device("cpu"), torch.float32)
        self.num_slots = num_slots
        self.slot_tokens = slot_tokens
        AttentionInterface.register(ATTENTION, _attention)
        model.set_attn_implementation(ATTENTION)

    @property
    def bytes_per_token(self) -> int:
        """Known once something has been fed."""
        return sum(self._layer_bytes.values())

    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        self._rows = rows = _Rows(pieces, self._device, self._dtype)
        logits_1RV = self._model(
            input_ids=rows.tokens_T[None],
            position_ids=rows.positions_T[None],
            use_cache=False,
            slots=self,
            **({"logits_to_keep": rows.wanted_R} if self._keeps_logits else {}),
        ).logits
        logits_RV: Tensor = logits_1RV[0] if self._keeps_logits else logits_1RV[0, rows.wanted_R]
        return logits_RV.float().cpu()

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        for held in self._held():
            held[target, :, :num_tokens] = held[source, :, :num_tokens]

    def clear(self, slot: int) -> None:
        for held in self._held():
            held[slot].zero_()

    def resize(self, *, num_slots: int, slot_tokens: int) -> None:
        """Other slots, all of them empty."""
        self._pools.clear()
        self.num_slots, self.slot_tokens = num_slots, slot_tokens

    def attend(
        self,
        layer: int,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGE: Tensor,
        scale: float | None,
        window: int | None = None,
    ) -> Tensor:
        """Write the keys and values of all pieces, and attend: (T, H, E)."""
        pool, rows = self._pool(layer, key_TGD, value_TGE), self._rows
        pool.keys[rows.slots_T, :, rows.positions_T] = key_TGD
        pool.values[rows.slots_T, :, rows.positions_T] = value_TGE
        num_rows, num_heads, dimension = query_THD.shape
        # The query heads that share a key head.
        query_TGND = query_THD.reshape(num_rows, key_TGD.shape[1], -1, dimension)
        attended = [
            _attend(
                query_TGND[group.begin : group.end],
                *pool.of(group.slots, length := min(group.length, self.slot_tokens)),
                rows.mask(group, length, window),
                scale,
            )
            for group in rows.groups
        ]
        together = attended[0] if len(attended) == 1 else torch.cat(attended)
        return together.reshape(num_rows, num_heads, -1)

    def _held(self) -> Iterator[Tensor]:
        for pool in self._pools.values():
            yield from (pool.keys, pool.values)

    def _pool(self, layer: int, key_TGD: Tensor, value_TGE: Tensor) -> "_Pool":
        pool = self._pools.get(layer)
        if pool is None:
            keys, values = (
                like.new_empty(self.num_slots, like.shape[1], self.slot_tokens, like.shape[2])
                for like in (key_TGD, value_TGE)
            )
            # Written to, so that a CPU's memory is taken now: what is checked before the next version is what is left.
            pool = self._pools[layer] = _Pool(keys.zero_(), values.zero_())
            self._layer_bytes[layer] = key_TGD[0].nbytes + value_TGE[0].nbytes
        return pool


class _Pool:
    """One layer's keys (S, G, L, D) and values (S, G, L, E)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self._views: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def of(self, slots: slice, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` of neighbouring slots. Turn after turn they are mostly the same: to cut them out anew would cost
        a tenth of attending to them.
        """
        place = (slots.start, slots.stop, length)
        views = self._views.get(place)
        if views is None:
            if len(self._views) == MOST_VIEWS:
                self._views.clear()
            views = self._views[place] = (self.keys[slots, :, :length], self.values[slots, :, :length])
        return views


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slots: SlotForward,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    query_THD, key_TGD, value_TGE = (heads[0].transpose(0, 1) for heads in (query, key, value))
    attended_THE = slots.attend(module.layer_idx, query_THD, key_TGD, value_TGE, scaling, sliding_window)
    return attended_THE[None], None


def _attend(
    query_TGND: Tensor, keys_BGLD: Tensor, values_BGLE: Tensor, mask: Tensor, scale: float | None
) -> Tensor:
    """(T, G, N, E): of T sequences with a token each, or of one with T tokens. N query heads share a key head."""
    num_tokens, num_key_heads, num_shared, _ = query_TGND.shape
    if num_tokens == len(keys_BGLD):
        # Those that share a key head stand where more tokens would: keys need not be repeated.
        return scaled_dot_product_attention(query_TGND, keys_BGLD, values_BGLE, attn_mask=mask, scale=scale)
    attended_1HTE = scaled_dot_product_attention(
        query_TGND.flatten(1, 2).transpose(0, 1)[None],
        keys_BGLD,
        values_BGLE,
        attn_mask=mask,
        scale=scale,
        enable_gqa=num_shared > 1,
    )
    attended_TGNE: Tensor = attended_1HTE[0].transpose(0, 1).unflatten(1, (num_key_heads, num_shared))
    return attended_TGNE


class _Group(NamedTuple):
    """Rows ``begin`` to ``end`` of a pass: neighbouring slots with a token each, or one slot with several."""

    begin: int
    end: int
    slots: slice
    length: int  # keys that are looked at, in the steps of LENGTH_STEP


class _Rows:
    """One pass: where its rows come from and go to."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device, dtype: torch.dtype) -> None:
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for piece in pieces:
            tokens += piece.tokens
            slots += [piece.slot] * len(piece.tokens)
            positions += range(piece.begin, piece.begin + len(piece.tokens))
            wanted += range(len(tokens) - piece.num_logits, len(tokens))
        self.tokens_T, self.slots_T, self.positions_T, self.wanted_R = (
            torch.tensor(numbers, dtype=torch.long, device=device)
            for numbers in (tokens, slots, positions, wanted)
        )
        self.groups = list(_groups(pieces, KEYS_IN_VAIN[device.type]))
        self._dtype = dtype
        self._of_all: dict[int | None, Tensor] = {}  # masks of all rows, by window
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def mask(self, group: _Group, length: int, window: int | None) -> Tensor:
        """What is added to the scores of a group: (B, 1, 1, L) or (1, 1, T, L)."""
        mask = self._masks.get((group.begin, window))
        if mask is None:
            if window not in self._of_all:
                self._of_all[window] = self._mask_of_all(window)
            mask_TL = self._of_all[window][group.begin : group.end, :length]
            together = group.slots.stop - group.slots.start == group.end - group.begin
            mask = self._masks[group.begin, window] = (
                mask_TL[:, None, None] if together else mask_TL[None, None]
            )
        return mask

    def _mask_of_all(self, window: int | None) -> Tensor:
        """For all groups at once, as long as the longest: a few calls instead of a few for each, of up to 16."""
        own_T1 = self.positions_T[:, None]
        of_keys_L = torch.arange(max(group.length for group in self.groups), device=own_T1.device)
        hidden_TL = of_keys_L > own_T1
        if window is not None:
            hidden_TL |= of_keys_L <= own_T1 - window
        mask_TL = torch.zeros(hidden_TL.shape, dtype=self._dtype, device=own_T1.device)
        return mask_TL.masked_fill_(hidden_TL, float("-inf"))


def _groups(pieces: Sequence[Piece], keys_in_vain: int) -> Iterator[_Group]:
    begin = 0
    together: list[Piece] = []
    for piece in pieces:
        if together and not _go_together(together, piece, keys_in_vain):
            yield _group(begin, together)
            begin += sum(len(member.tokens) for member in together)
            together = []
        together.append(piece)
    if together:
        yield _group(begin, together)


def _go_together(members: Sequence[Piece], piece: Piece, keys_in_vain: int) -> bool:
    """Whether one call more costs more than what a longer sequence has the shorter ones look at in vain."""
    last = members[-1]
    if not len(last.tokens) == len(piece.tokens) == 1 or piece.slot != last.slot + 1:
        return False
    longest = max(member.begin for member in members)
    in_vain = max(piece.begin - longest, 0) * len(members) + max(longest - piece.begin, 0)
    return in_vain <= keys_in_vain


def _group(begin: int, members: Sequence[Piece]) -> _Group:
    length = max(member.begin + len(member.tokens) for member in members)
    return _Group(
        begin,
        begin + sum(len(member.tokens) for member in members),
        slice(members[0].slot, members[-1].slot + 1),
        -(-length // LENGTH_STEP) * LENGTH_STEP,
    )
