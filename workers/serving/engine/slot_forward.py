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
from workers.serving.engine.packed_llama import PackedLlama

ATTENTION = "pathswitch_slots"
LENGTH_STEP = (
    16  # keys are looked at in multiples of this: sums are then in the same order beside longer sequences
)
KEYS_IN_VAIN = 64  # an estimate for 320 numbers a key on two cores: as long to look at as a call of attention takes to begin


class SlotForward:
    """Owns the slots of one model, whose attention it replaces for good.

    Slots hold ``slot_tokens`` tokens each; layers' keys and values have shape (S, H, L, D) in the model's own type. Memory is
    zeros from the start (what is masked must be finite), which on a CPU is not taken before it is written to.
    """

    reuses = True

    def __init__(self, model: Any, *, num_slots: int, slot_tokens: int) -> None:
        self._model = model
        self._device, self._dtype = model.device, model.dtype
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._layers: PackedLlama | None = None  # instead of the model's own
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
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
        wanted_R = torch.tensor(rows.wanted, dtype=torch.long, device=self._device)
        if self._layers is not None:
            return self._layers(rows.tokens_T, rows.positions_T, wanted_R, self.attend)
        logits_1RV = self._model(
            input_ids=rows.tokens_T[None],
            position_ids=rows.positions_T[None],
            use_cache=False,
            slots=self,
            **({"logits_to_keep": wanted_R} if self._keeps_logits else {}),
        ).logits
        logits_RV: Tensor = logits_1RV[0] if self._keeps_logits else logits_1RV[0, wanted_R]
        return logits_RV.float().cpu()

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        for pool in (*self._keys.values(), *self._values.values()):
            pool[target, :, :num_tokens] = pool[source, :, :num_tokens]

    def clear(self, slot: int) -> None:
        for pool in (*self._keys.values(), *self._values.values()):
            pool[slot].zero_()

    def resize(self, *, num_slots: int, slot_tokens: int) -> None:
        """Other slots, all of them empty."""
        self._keys.clear()
        self._values.clear()
        self.num_slots, self.slot_tokens = num_slots, slot_tokens

    def pack(self, layers: PackedLlama | None) -> None:
        """Have them instead of the model's own, from a sequence's begin on; None: the model's own again."""
        self._layers = layers

    def let_go_of_model(self) -> None:
        """Its weights are packed: they need not be kept twice."""
        self._model = None

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
        if layer not in self._keys:
            self._keys[layer], self._values[layer] = self._pool(key_TGD), self._pool(value_TGE)
            self._layer_bytes[layer] = key_TGD[0].nbytes + value_TGE[0].nbytes
        keys, values, rows = self._keys[layer], self._values[layer], self._rows
        keys[rows.slots_T, :, rows.positions_T] = key_TGD
        values[rows.slots_T, :, rows.positions_T] = value_TGE
        attended = []
        for group in rows.groups:
            length = min(group.length, self.slot_tokens)
            attended.append(
                _attend(
                    query_THD[group.begin : group.end],
                    keys[group.slots, :, :length],
                    values[group.slots, :, :length],
                    rows.mask(group, length, window),
                    scale,
                )
            )
        return attended[0] if len(attended) == 1 else torch.cat(attended)

    def _pool(self, like_TGD: Tensor) -> Tensor:
        _, heads, dimension = like_TGD.shape
        return torch.zeros(
            (self.num_slots, heads, self.slot_tokens, dimension),
            dtype=like_TGD.dtype,
            device=like_TGD.device,
        )


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
    query_THD: Tensor, keys_BHLD: Tensor, values_BHLD: Tensor, mask: Tensor, scale: float | None
) -> Tensor:
    """(T, H, D): of T sequences with a token each, or of one with T tokens."""
    num_tokens, num_heads, dimension = query_THD.shape
    num_sequences, num_key_heads = keys_BHLD.shape[:2]
    if num_tokens == num_sequences:
        # The query heads that share a key head stand where more tokens would: keys need not be repeated.
        query = query_THD.reshape(num_tokens, num_key_heads, -1, dimension)
        attended = scaled_dot_product_attention(query, keys_BHLD, values_BHLD, attn_mask=mask, scale=scale)
        return attended.reshape(num_tokens, num_heads, -1)
    shared = num_heads != num_key_heads
    attended = scaled_dot_product_attention(
        query_THD.transpose(0, 1)[None],
        keys_BHLD,
        values_BHLD,
        attn_mask=mask,
        scale=scale,
        enable_gqa=shared,
    )
    return attended[0].transpose(0, 1)


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
        self.wanted: list[int] = []
        for piece in pieces:
            tokens += piece.tokens
            slots += [piece.slot] * len(piece.tokens)
            positions += range(piece.begin, piece.begin + len(piece.tokens))
            self.wanted += range(len(tokens) - piece.num_logits, len(tokens))
        self.tokens_T = torch.tensor(tokens, dtype=torch.long, device=device)
        self.slots_T = torch.tensor(slots, dtype=torch.long, device=device)
        self.positions_T = torch.tensor(positions, dtype=torch.long, device=device)
        self.groups = list(_groups(pieces))
        self._dtype = dtype
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def mask(self, group: _Group, length: int, window: int | None) -> Tensor:
        """What is added to the scores of a group: (B, 1, 1, L) or (1, 1, T, L)."""
        mask = self._masks.get((group.begin, window))
        if mask is None:
            own_T1 = self.positions_T[group.begin : group.end, None]
            of_keys_L = torch.arange(length, device=own_T1.device)
            hidden_TL = of_keys_L > own_T1
            if window is not None:
                hidden_TL |= of_keys_L <= own_T1 - window
            mask_TL = torch.zeros(hidden_TL.shape, dtype=self._dtype, device=own_T1.device)
            mask_TL.masked_fill_(hidden_TL, float("-inf"))
            together = group.slots.stop - group.slots.start == group.end - group.begin
            mask = mask_TL[:, None, None] if together else mask_TL[None, None]
            self._masks[group.begin, window] = mask
        return mask


def _groups(pieces: Sequence[Piece]) -> Iterator[_Group]:
    begin = 0
    together: list[Piece] = []
    for piece in pieces:
        if together and not _go_together(together, piece):
            yield _group(begin, together)
            begin += sum(len(member.tokens) for member in together)
            together = []
        together.append(piece)
    if together:
        yield _group(begin, together)


def _go_together(members: Sequence[Piece], piece: Piece) -> bool:
    """Whether one call more costs more than what a longer sequence has the shorter ones look at in vain."""
    last = members[-1]
    if not len(last.tokens) == len(piece.tokens) == 1 or piece.slot != last.slot + 1:
        return False
    longest = max(member.begin for member in members)
    in_vain = max(piece.begin - longest, 0) * len(members) + max(longest - piece.begin, 0)
    return in_vain <= KEYS_IN_VAIN


def _group(begin: int, members: Sequence[Piece]) -> _Group:
    length = max(member.begin + len(member.tokens) for member in members)
    return _Group(
        begin,
        begin + sum(len(member.tokens) for member in members),
        slice(members[0].slot, members[-1].slot + 1),
        -(-length // LENGTH_STEP) * LENGTH_STEP,
    )
