"""Runs all sequences in one pass, over a KV cache whose slots stay in place.

The runner replaces the model's attention through transformers' attention interface. Whether a model really
uses it is tested, not looked up (``runner_selection``).
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from workers.serving.engine.batching.kv_cache_pool import KVCachePool
from workers.serving.engine.batching.model_runner import PrefillChunk
from workers.serving.engine.batching.step_batch import StepBatch

ATTENTION = "pathswitch_slots"


class SlotRunner:
    """Owns one model, replaces its attention permanently, and keeps a ``KVCachePool`` for every layer."""

    reuses = True

    def __init__(self, model: Any, *, num_slots: int, slot_tokens: int) -> None:
        self._model = model
        self._device, self._dtype = model.device, model.dtype
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._pools: dict[int, KVCachePool] = {}  # by layer
        self._batch = StepBatch((), torch.device("cpu"), torch.float32)
        self.num_slots = num_slots
        self.slot_tokens = slot_tokens
        AttentionInterface.register(ATTENTION, _attention)
        model.set_attn_implementation(ATTENTION)

    @property
    def bytes_per_token(self) -> int:
        """KV cache bytes per token, known after the first call."""
        return sum(pool.bytes_per_token for pool in self._pools.values())

    def __call__(self, chunks: Sequence[PrefillChunk]) -> Tensor:
        self._batch = batch = StepBatch(chunks, self._device, self._dtype)
        logits_1RV = self._model(
            input_ids=batch.tokens_T[None],
            position_ids=batch.positions_T[None],
            use_cache=False,
            slot_runner=self,
            **({"logits_to_keep": batch.wanted_R} if self._keeps_logits else {}),
        ).logits
        logits_RV: Tensor = logits_1RV[0] if self._keeps_logits else logits_1RV[0, batch.wanted_R]
        return logits_RV.float().cpu()

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        for pool in self._pools.values():
            pool.copy(source, target, num_tokens)

    def clear(self, slot: int) -> None:
        for pool in self._pools.values():
            pool.clear(slot)

    def resize(self, *, num_slots: int, slot_tokens: int) -> None:
        """Replace all slots by empty ones of another size."""
        self._pools.clear()
        self.num_slots, self.slot_tokens = num_slots, slot_tokens

    def attend(
        self,
        layer: int,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGE: Tensor,
        scale: float | None,
        window: int | None,
    ) -> Tensor:
        """Write the step's keys and values to the layer's pool, then attend: (T, H, E)."""
        batch = self._batch
        if layer not in self._pools:
            self._pools[layer] = KVCachePool(self.num_slots, self.slot_tokens, key_TGD, value_TGE)
        pool = self._pools[layer]
        pool.write(batch.slots_T, batch.positions_T, key_TGD, value_TGE)
        num_rows, num_heads, dimension = query_THD.shape
        # N query heads share each of the G key heads.
        query_TGND = query_THD.reshape(num_rows, key_TGD.shape[1], -1, dimension)
        attended = [
            _attend(
                query_TGND[group.begin : group.end],
                *pool.view(group.slots, length := min(group.length, self.slot_tokens)),
                batch.mask(group, length, window),
                scale,
            )
            for group in batch.groups
        ]
        attended_TGNE = attended[0] if len(attended) == 1 else torch.cat(attended)
        return attended_TGNE.reshape(num_rows, num_heads, -1)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    slot_runner: SlotRunner,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    query_THD, key_TGD, value_TGE = (heads[0].transpose(0, 1) for heads in (query, key, value))
    attended_THE = slot_runner.attend(
        module.layer_idx, query_THD, key_TGD, value_TGE, scaling, sliding_window
    )
    return attended_THE[None], None


def _attend(
    query_TGND: Tensor, keys_BGLD: Tensor, values_BGLE: Tensor, mask: Tensor, scale: float | None
) -> Tensor:
    """(T, G, N, E) for T sequences with one token each, or for one sequence with T tokens."""
    num_tokens, num_key_heads, num_shared, _ = query_TGND.shape
    if num_tokens == len(keys_BGLD):
        # The N query heads take the place of the query tokens, so that keys need not be repeated.
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
