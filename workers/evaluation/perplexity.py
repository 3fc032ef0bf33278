"""Measures a causal model's loss on fixed documents, in fp32, with every token as a target once.

The documents form one stream, <end> d1 <end> d2 <end> …, which is cut into rows of the sequence length.
Neighbouring rows overlap by one token: the last target of a row is the first input of the next. The leading
<end> is the first token's context. The last row is padded, and a mask excludes the padding.

Shape suffixes: B rows, T tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from service.core.errors import Stopped
from service.core.stage_specs import Numerics
from workers.data.mixture import Ints
from workers.data.tokenizer import TextEncoder, load_tokenizer
from workers.training.loss import NextTokenLoss
from workers.training.pretrained import load_model
from workers.training.process import numerics_applied
from workers.training.ranks import Ranks

# Tokens per batch: enough for efficient matrix products, few enough for the activations of a large model.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class TextLoss:
    """``loss`` is the mean in nats per token; ``text_bytes`` is the size of the texts in UTF-8."""

    loss: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf  # exp(710) overflows a float

    @property
    def bits_per_byte(self) -> float:
        """loss · tokens / (ln 2 · bytes), which is comparable across tokenizers."""
        return self.loss * self.tokens / (math.log(2) * self.text_bytes)


class Evaluator:
    """Evaluates an exported model with its tokenizer."""

    def __init__(self, export: Path, numerics: Numerics, sequence_length: int) -> None:
        self._numerics = numerics
        self._sequence_length = sequence_length
        self._device = Ranks.current(numerics.device).device
        self._encoder = TextEncoder(load_tokenizer(export))
        model = load_model(export, dtype=torch.float32, attn_implementation=numerics.attention)
        self._loss_of = NextTokenLoss(model).to(self._device).eval()

    def evaluate(self, texts: Iterable[str], should_stop: Callable[[], bool]) -> TextLoss | None:
        """Evaluate the model on documents. Returns None if there are none. Raises Stopped between batches."""
        loss, tokens = 0.0, 0
        stream = _TokenStream(self._encoder, texts)
        with numerics_applied(self._numerics), torch.no_grad():
            for rows_BT, lengths_B in self._batches(stream.ids()):
                if should_stop():
                    raise Stopped("stopped while evaluating")
                mask_BT = np.arange(self._sequence_length)[None] < lengths_B[:, None]
                loss += self._loss_of(
                    torch.from_numpy(rows_BT).to(self._device), torch.from_numpy(mask_BT).to(self._device)
                ).item()
                tokens += int(lengths_B.sum())
        return TextLoss(loss / tokens, tokens, stream.text_bytes) if tokens else None

    def _batches(self, ids: Iterator[Ints]) -> Iterator[tuple[Ints, Ints]]:
        """Yield rows of shape (B, T + 1), and for each row how many of its targets are not padding."""
        rows: list[Ints] = []
        for row in rows_of_stream(ids, self._encoder.end_of_text, self._sequence_length):
            rows.append(row)
            if len(rows) * self._sequence_length >= BATCH_TOKENS:
                yield _padded(rows, self._sequence_length)
                rows = []
        if rows:
            yield _padded(rows, self._sequence_length)


def rows_of_stream(blocks: Iterable[Ints], end_of_text: int, sequence_length: int) -> Iterator[Ints]:
    """Cut the stream into rows of ``sequence_length + 1`` tokens; the last row may be shorter.

    Each token of the blocks is a target in exactly one row.
    """
    buffer = np.array([end_of_text], dtype=np.int64)
    for block in blocks:
        buffer = np.concatenate([buffer, block])
        full = (len(buffer) - 1) // sequence_length
        for index in range(full):
            yield buffer[index * sequence_length : (index + 1) * sequence_length + 1]
        buffer = buffer[full * sequence_length :]
    if len(buffer) > 1:
        yield buffer


def _padded(rows: list[Ints], sequence_length: int) -> tuple[Ints, Ints]:
    padded = np.zeros((len(rows), sequence_length + 1), dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded, np.array([len(row) - 1 for row in rows])


class _TokenStream:
    """Encodes texts block by block and counts the bytes of the texts it has read."""

    def __init__(self, encoder: TextEncoder, texts: Iterable[str]) -> None:
        self._encoder = encoder
        self._texts = texts
        self.text_bytes = 0

    def ids(self) -> Iterator[Ints]:
        for block in self._encoder.encode(self._texts):
            self.text_bytes += block.text_bytes
            yield block.ids
