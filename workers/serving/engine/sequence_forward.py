"""Forward for any causal model of transformers: a cache of its own for every slot, one sequence after another."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from workers.serving.engine.forward import Piece


class SequenceForward:
    """For models whose attention cannot be given to ``SlotForward``. Nothing is reused: a cache may not be cut back."""

    reuses = False

    def __init__(self, model: Any, *, num_slots: int, slot_tokens: int) -> None:
        self._model = model
        self._caches: dict[int, DynamicCache] = {}
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.num_slots = num_slots
        self.slot_tokens = slot_tokens

    @property
    def bytes_per_token(self) -> int:
        """Known once something has been fed."""
        cache = next(iter(self._caches.values()))
        held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
        num_bytes: int = sum(tensor.nbytes for tensor in held if tensor is not None)
        return num_bytes // max(int(cache.get_seq_length()), 1)

    def __call__(self, pieces: Sequence[Piece]) -> Tensor:
        return torch.cat([self._feed(piece) for piece in pieces])

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        raise AssertionError("nothing is reused")

    def clear(self, slot: int) -> None:
        self._caches.pop(slot, None)

    def _feed(self, piece: Piece) -> Tensor:
        if piece.begin == 0:
            self._caches[piece.slot] = DynamicCache(config=self._model.config)
        arguments: dict[str, Any] = {"logits_to_keep": max(piece.num_logits, 1)} if self._keeps_logits else {}
        output = self._model(
            input_ids=torch.tensor([piece.tokens], device=self._model.device),
            past_key_values=self._caches[piece.slot],
            use_cache=True,
            **arguments,
        )
        logits_TV: Tensor = output.logits[0]
        return logits_TV[len(logits_TV) - piece.num_logits :].float().cpu()
