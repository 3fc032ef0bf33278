"""The forward that fits a model: over slots where the model is seen to answer the same with it, else one by one."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from workers.serving.engine.forward import Forward, Piece
from workers.serving.engine.port import NOT_FINITE, EngineError
from workers.serving.engine.sequence_forward import SequenceForward
from workers.serving.engine.slot_forward import SlotForward

logger = logging.getLogger(__name__)

_TRIED_TOKENS = 12  # of each of two sequences
_PIECES = (
    (5, 3, 1, 1, 2),
    (1, 1, 1, 7, 2),
)  # how they are fed: alone and together, several tokens and single ones
# How far logits may be off, in standard deviations of theirs: rounding, and nothing that a wrong mask would do.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_OF_ALL_POSITIONS = ("dynamic", "longrope")  # rotary angles that depend on the longest sequence of a batch


class Differs(Exception):
    """The model answers otherwise than it does by itself."""


def forward_for(model: Any, *, max_slots: int, slot_tokens: int, kv_cache_bytes: int) -> Forward:
    """Slots for at most ``max_slots`` sequences of ``slot_tokens``: fewer slots, and then shorter ones, where they
    would take more than ``kv_cache_bytes``. Call it under ``torch.inference_mode``; the model is the forward's from then on.
    Raises EngineError for a model whose logits are not finite, and ValueError for one that answers otherwise with a cache
    of keys and values than without.
    """
    trial = _Trial(model)
    attention = model.config._attn_implementation
    try:
        if trial.depends_on_the_batch:
            raise Differs("its rotary angles depend on the longest sequence")
        forward = SlotForward(model, num_slots=2, slot_tokens=_TRIED_TOKENS)
        trial.run(forward)
    except Exception as error:  # whatever a model says to a foreign attention: it can still do it its own way
        logger.warning("%s decodes one sequence at a time: %s", type(model).__name__, error)
        model.set_attn_implementation(attention)
        return _one_by_one(model, trial, max_slots, slot_tokens, kv_cache_bytes)
    num_slots, slot_tokens = _fitting(max_slots, slot_tokens, kv_cache_bytes, forward.bytes_per_token)
    forward.resize(num_slots=num_slots, slot_tokens=slot_tokens)
    return forward


def _fitting(max_slots: int, slot_tokens: int, kv_cache_bytes: int, bytes_per_token: int) -> tuple[int, int]:
    """How many slots, and of how many tokens."""
    tokens = kv_cache_bytes // max(bytes_per_token, 1)
    num_slots = max(1, min(max_slots, tokens // slot_tokens))
    if num_slots < max_slots:
        logger.warning("%d slots of %d tokens fit %d bytes", num_slots, slot_tokens, kv_cache_bytes)
    return num_slots, min(slot_tokens, tokens)


def _one_by_one(
    model: Any, trial: "_Trial", max_slots: int, slot_tokens: int, kv_cache_bytes: int
) -> Forward:
    forward = SequenceForward(model, num_slots=2, slot_tokens=_TRIED_TOKENS)
    try:
        trial.run(forward)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} does not decode with a cache: {error}") from error
    forward.num_slots, forward.slot_tokens = _fitting(
        max_slots, slot_tokens, kv_cache_bytes, forward.bytes_per_token
    )
    for slot in range(2):
        forward.clear(slot)
    return forward


class _Trial:
    """What a model answers by itself to two short sequences, to compare with."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        self.depends_on_the_batch = rope.get("rope_type") in _OF_ALL_POSITIONS
        tokens_BT = torch.arange(2 * _TRIED_TOKENS, device=model.device).view(2, -1) * 7 % config.vocab_size
        self._tokens: Sequence[Sequence[int]] = tokens_BT.tolist()
        self._expected_BTV = model(input_ids=tokens_BT, use_cache=False).logits.float().cpu()
        if not torch.isfinite(self._expected_BTV).all():
            raise EngineError(NOT_FINITE)
        self._tolerance = _TOLERANCE[model.dtype] * float(self._expected_BTV.std())

    def run(self, forward: Forward) -> None:
        """Raises Differs, or whatever the model raises."""
        begin = [0, 0]
        for lengths in zip(*_PIECES, strict=True):
            pieces = [
                Piece(slot, begin[slot], self._tokens[slot][begin[slot] : begin[slot] + length], length)
                for slot, length in enumerate(lengths)
            ]
            answers = forward(pieces).split(list(lengths))
            for piece, answer_TV in zip(pieces, answers, strict=True):
                end = piece.begin + len(piece.tokens)
                expected_TV = self._expected_BTV[piece.slot, piece.begin : end]
                if not torch.allclose(answer_TV, expected_TV, rtol=0, atol=self._tolerance):
                    off = float((answer_TV - expected_TV).abs().max())
                    raise Differs(f"logits are off by {off:.3g}, more than {self._tolerance:.3g}")
                begin[piece.slot] = end
