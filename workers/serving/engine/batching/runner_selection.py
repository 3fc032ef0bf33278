"""Selects the runner for a model by trial: slots if the logits agree, else one sequence at a time."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from workers.serving.engine.batching.kv_cache_pool import num_slots_and_tokens
from workers.serving.engine.batching.model_runner import ModelRunner, PrefillChunk
from workers.serving.engine.batching.sequence_runner import SequenceRunner
from workers.serving.engine.batching.slot_runner import SlotRunner
from workers.serving.engine.port import NOT_FINITE, EngineError

logger = logging.getLogger(__name__)

_CHECK_TOKENS = 12  # per sequence; the check has two
_CHUNK_LENGTHS = ((5, 3, 1, 1, 2), (1, 1, 1, 7, 2))  # of both: one or several tokens, side by side
# Allowed difference in standard deviations of the logits: more than rounding, far less than a wrong mask
# causes.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")  # the angles depend on the longest sequence in the batch


class LogitsDiffer(Exception):
    """The runner's logits are not the model's own."""


def select_runner(model: Any, *, max_slots: int, slot_tokens: int, kv_cache_bytes: int) -> ModelRunner:
    """A runner with at most ``max_slots`` slots of ``slot_tokens`` tokens; it takes ownership of the model.

    If the slots would take more than ``kv_cache_bytes``, there are fewer of them; if even one does not fit,
    it is shorter. Call this under ``torch.inference_mode``. Raises EngineError if the model's logits are not
    finite, and ValueError if its answers with a KV cache differ from those without.
    """
    check = _LogitsCheck(model)
    attention = model.config._attn_implementation
    runner: SlotRunner | SequenceRunner
    try:
        if check.depends_on_batch:
            raise LogitsDiffer("its rotary angles depend on the longest sequence")
        runner = SlotRunner(model, num_slots=2, slot_tokens=_CHECK_TOKENS)
        check.run(runner)
    except Exception as error:  # a replaced attention can fail in many ways; every model runs with its own
        logger.warning("%s decodes one sequence at a time: %s", type(model).__name__, error)
        model.set_attn_implementation(attention)
        runner = _sequence_runner(model, check)
    num_slots, slot_tokens = num_slots_and_tokens(
        max_slots, slot_tokens, kv_cache_bytes, runner.bytes_per_token
    )
    if num_slots < max_slots:
        logger.warning("only %d of %d slots fit in %d bytes", num_slots, max_slots, kv_cache_bytes)
    runner.resize(num_slots=num_slots, slot_tokens=slot_tokens)
    return runner


def _sequence_runner(model: Any, check: "_LogitsCheck") -> SequenceRunner:
    runner = SequenceRunner(model, num_slots=2, slot_tokens=_CHECK_TOKENS)
    try:
        check.run(runner)
    except Exception as error:
        raise ValueError(f"{type(model).__name__} does not decode with a KV cache: {error}") from error
    return runner


class _LogitsCheck:
    """Two short sequences and the model's own logits for them."""

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        self.depends_on_batch = rope.get("rope_type") in _BATCH_DEPENDENT_ROPE
        tokens_BT = torch.arange(2 * _CHECK_TOKENS, device=model.device).view(2, -1) * 7 % config.vocab_size
        self._tokens: Sequence[Sequence[int]] = tokens_BT.tolist()
        self._expected_BTV = model(input_ids=tokens_BT, use_cache=False).logits.float().cpu()
        if not torch.isfinite(self._expected_BTV).all():
            raise EngineError(NOT_FINITE)
        self._tolerance = _TOLERANCE[model.dtype] * float(self._expected_BTV.std())

    def run(self, runner: ModelRunner) -> None:
        """Feed both sequences. Raises LogitsDiffer, or any exception of the model."""
        begin = [0, 0]
        for lengths in zip(*_CHUNK_LENGTHS, strict=True):
            chunks = [
                PrefillChunk(
                    slot, begin[slot], self._tokens[slot][begin[slot] : begin[slot] + length], length
                )
                for slot, length in enumerate(lengths)
            ]
            for chunk, logits_TV in zip(chunks, runner(chunks).split(list(lengths)), strict=True):
                end = chunk.begin + len(chunk.tokens)
                expected_TV = self._expected_BTV[chunk.slot, chunk.begin : end]
                if not torch.allclose(logits_TV, expected_TV, rtol=0, atol=self._tolerance):
                    difference = float((logits_TV - expected_TV).abs().max())
                    raise LogitsDiffer(f"logits differ by {difference:.3g}, more than {self._tolerance:.3g}")
                begin[chunk.slot] = end
