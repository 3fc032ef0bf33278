"""Loss of a causal model on a fixed set of documents: every token counted once, in fp32.

The documents make one stream, <end> d1 <end> d2 <end> …, cut into rows of the sequence length that overlap by
the one token that is a row's last target and the next row's first input. The leading end gives the first
token something to follow; the last row is padded and its padding masked.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from service.core.errors import Stopped
from service.core.stage_specs import Numerics
from workers.data.tokenizer import TextEncoder, load_tokenizer
from workers.training.loss import NextTokenLoss
from workers.training.pretrained import load_model
from workers.training.process import numerics_applied
from workers.training.ranks import Ranks

# Tokens at a time: enough for full matrix products, small enough for the activations of a large model.
_BATCH_TOKENS = 4096

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Evaluation:
    """``loss`` in nats per token; ``text_bytes`` of UTF-8: bits per byte compare across tokenizers."""

    loss: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # exp(710) does not fit a float

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / (math.log(2) * self.text_bytes)


class Evaluator:
    """An exported model with its tokenizer, ready to be measured."""

    def __init__(self, export: Path, numerics: Numerics, sequence_length: int) -> None:
        self._numerics = numerics
        self._sequence_length = sequence_length
        self._device = Ranks.current(numerics.device).device
        self._encoder = TextEncoder(load_tokenizer(export))
        model = load_model(export, dtype=torch.float32, attn_implementation=numerics.attention)
        self._loss_of = NextTokenLoss(model).to(self._device).eval()

    def evaluate(self, texts: Iterable[str], should_stop: Callable[[], bool]) -> Evaluation | None:
        """Measure the documents; None if there are none. Raises Stopped between two batches."""
        loss, tokens, text_bytes = 0.0, 0, 0
        blocks = _Counted(self._encoder, texts)
        with numerics_applied(self._numerics), torch.no_grad():
            for rows, lengths in self._batches(blocks.ids()):
                if should_stop():
                    raise Stopped("stopped while evaluating")
                mask = np.arange(self._sequence_length)[None] < lengths[:, None]
                loss += self._loss_of(
                    torch.from_numpy(rows).to(self._device), torch.from_numpy(mask).to(self._device)
                ).item()
                tokens += int(lengths.sum())
        text_bytes = blocks.text_bytes
        return Evaluation(loss / tokens, tokens, text_bytes) if tokens else None

    def _batches(self, ids: Iterator[Ints]) -> Iterator[tuple[Ints, Ints]]:
        """Rows of shape (batch, length + 1) and how many targets of each count."""
        rows: list[Ints] = []
        for row in rows_of_stream(ids, self._encoder.end_of_text, self._sequence_length):
            rows.append(row)
            if len(rows) * self._sequence_length >= _BATCH_TOKENS:
                yield _padded(rows, self._sequence_length)
                rows = []
        if rows:
            yield _padded(rows, self._sequence_length)


def rows_of_stream(blocks: Iterable[Ints], end_of_text: int, sequence_length: int) -> Iterator[Ints]:
    """Cut the stream into rows of ``sequence_length + 1`` tokens, the last one shorter.

    Each token of the blocks is a target in exactly one row.
    """
    held = np.array([end_of_text], dtype=np.int64)
    for block in blocks:
        held = np.concatenate([held, block])
        full = (len(held) - 1) // sequence_length
        for index in range(full):
            yield held[index * sequence_length : (index + 1) * sequence_length + 1]
        held = held[full * sequence_length :]
    if len(held) > 1:
        yield held


def _padded(rows: list[Ints], sequence_length: int) -> tuple[Ints, Ints]:
    padded = np.zeros((len(rows), sequence_length + 1), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded, np.array([len(row) - 1 for row in rows])


class _Counted:
    """Token ids of the texts, block by block, and the bytes of the texts that have been read."""

    def __init__(self, encoder: TextEncoder, texts: Iterable[str]) -> None:
        self._encoder = encoder
        self._texts = texts
        self.text_bytes = 0

    def ids(self) -> Iterator[Ints]:
        for block in self._encoder.encode(self._texts):
            self.text_bytes += block.text_bytes
            yield block.ids
