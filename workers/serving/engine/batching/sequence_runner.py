"""Runs any causal model of transformers one sequence after another, with a cache per slot."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from workers.serving.engine.batching.model_runner import PrefillChunk


class SequenceRunner:
    """For models whose attention ``SlotRunner`` cannot replace.

    It reuses nothing, because not every cache can be cut back.
    """

    reuses = False

    def __init__(self, model: Any, *, num_slots: int, slot_tokens: int) -> None:
        self._model = model
        self._caches: dict[int, DynamicCache] = {}
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.num_slots = num_slots
        self.slot_tokens = slot_tokens

    @property
    def bytes_per_token(self) -> int:
        """KV cache bytes per token, known after the first call."""
        cache = next(iter(self._caches.values()))
        tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
        num_bytes: int = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return num_bytes // max(int(cache.get_seq_length()), 1)

    def __call__(self, chunks: Sequence[PrefillChunk]) -> Tensor:
        return torch.cat([self._run(chunk) for chunk in chunks])

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        raise AssertionError("a runner that reuses nothing was asked to copy a slot")

    def clear(self, slot: int) -> None:
        self._caches.pop(slot, None)

    def resize(self, *, num_slots: int, slot_tokens: int) -> None:
        """Replace all slots by empty ones of another size."""
        self._caches.clear()
        self.num_slots, self.slot_tokens = num_slots, slot_tokens

    def _run(self, chunk: PrefillChunk) -> Tensor:
        if chunk.begin == 0:
            self._caches[chunk.slot] = DynamicCache(config=self._model.config)
        arguments: dict[str, Any] = {"logits_to_keep": max(chunk.num_logits, 1)} if self._keeps_logits else {}
        output = self._model(
            input_ids=torch.tensor([chunk.tokens], device=self._model.device),
            past_key_values=self._caches[chunk.slot],
            use_cache=True,
            **arguments,
        )
        logits_TV: Tensor = output.logits[0]
        return logits_TV[len(logits_TV) - chunk.num_logits :].float().cpu()
