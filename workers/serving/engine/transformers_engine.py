"""The default engine: an export in the Hugging Face layout on transformers, in this process, on one decode
thread.

Sequences take turns, one forward pass each. A later engine with slots and one static cache batches those
passes; nothing outside this file would change.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from workers.pretrained import load_model
from workers.serving.engine.chat_template import PLAIN_STOP, render_chat
from workers.serving.engine.decoding import SequenceDecoder
from workers.serving.engine.detokenizer import Vocabulary
from workers.serving.engine.port import (
    EngineError,
    EngineEvent,
    QueueFull,
    SequenceFailed,
    SequenceRequest,
    Sink,
)
from workers.serving.generation import Chat

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Running:
    index: int
    turns: Iterator[Sequence[EngineEvent]]
    sink: Sink
    cancelled: threading.Event = field(repr=False)


class TransformersEngine:
    """Loads the export in ``folder``: safetensors only, no network, no code from the folder.

    On a CPU it computes in float32 whatever the export is stored in; on a GPU in the stored type. ``threads``
    sets torch's intra-op threads for the whole process (0 leaves them): give it only in a process of the
    engine's own. Raises OSError or ValueError for a folder that is not such an export.
    """

    def __init__(
        self, folder: Path, threads: int = 0, *, max_active: int = 16, max_waiting: int = 512
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = load_model(folder, dtype="auto" if device.type == "cuda" else torch.float32)
        model.to(device).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        self._backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise ValueError(f"{folder}: no tokenizer.json")
        self._backend.no_truncation()
        self._backend.no_padding()
        config = model.config.get_text_config()
        context_length = getattr(config, "max_position_embeddings", None)
        if not context_length:
            raise ValueError(f"{folder}: config.json has no max_position_embeddings")
        self._context_length: int = context_length
        self._vocab_size: int = config.vocab_size
        decoder_kind = type(self._backend.decoder).__name__
        self._decoder = SequenceDecoder(
            model, Vocabulary(self._backend, decoder_kind), _end_tokens(model, self._tokenizer), device
        )
        self._max_active, self._max_waiting = max_active, max_waiting
        self._waiting: deque[_Running] = deque()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._decode_until_closed, name="decode", daemon=True)
        self._thread.start()

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def encode(self, text: str) -> tuple[int, ...]:
        ids = tuple(self._backend.encode(text, add_special_tokens=True).ids)
        return ids or (self._beginning(),)

    def encode_chat(self, chat: Chat) -> tuple[tuple[int, ...], tuple[str, ...]]:
        text = render_chat(self._tokenizer, chat)
        if self._tokenizer.chat_template is None:
            return self.encode(text), PLAIN_STOP
        # A template of the tokenizer's own writes the special tokens itself.
        return tuple(self._backend.encode(text, add_special_tokens=False).ids), ()

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        cancelled = threading.Event()
        running = [_Running(s.index, self._decoder.decode(s), sink, cancelled) for s in sequences]
        with self._changed:
            if self._closing:
                raise EngineError("the engine is closed")
            if len(self._waiting) + len(running) > self._max_waiting:
                self._waiting = deque(other for other in self._waiting if not other.cancelled.is_set())
            if len(self._waiting) + len(running) > self._max_waiting:
                raise QueueFull(f"{len(self._waiting)} sequences are waiting")
            self._waiting.extend(running)
            self._changed.notify()
        return cancelled.set

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()

    def _beginning(self) -> int:
        """The token an empty prompt stands for."""
        for id in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if id is not None:
                return int(id)
        return 0

    @torch.inference_mode()
    def _decode_until_closed(self) -> None:
        active: list[_Running] = []
        while self._admit(active):
            active = [running for running in active if _take_turn(running)]
        for running in [*active, *self._waiting]:
            running.sink([SequenceFailed(running.index, "the engine was closed")])

    def _admit(self, active: list[_Running]) -> bool:
        """Fill ``active`` from the queue, waiting while there is nothing to do. False once the engine is
        closed.
        """
        with self._changed:
            while not (self._closing or self._waiting or active):
                self._changed.wait()
            while self._waiting and len(active) < self._max_active:
                active.append(self._waiting.popleft())
            return not self._closing


def _take_turn(running: _Running) -> bool:
    """Decode one turn of a sequence; False when it is over."""
    if running.cancelled.is_set():
        return False
    try:
        events = next(running.turns, None)
    except Exception as error:  # whatever fails one sequence must reach its caller, and spare the others
        if not isinstance(error, EngineError):
            logger.exception("decoding failed")
        running.sink([SequenceFailed(running.index, f"{type(error).__name__}: {error}")])
        return False
    if events is None:
        return False
    if events:
        running.sink(list(events))
    return True


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a text, by the generation config, the model's config or the tokenizer."""
    ends: set[int] = set()
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        ends.update([value] if isinstance(value, int) else value or [])
    return frozenset(ends)
