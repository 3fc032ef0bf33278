"""The default engine: an export in the Hugging Face layout on transformers, in this process, on one decode thread."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from workers.pretrained import load_model
from workers.serving.engine.chat_template import PLAIN_STOP, render_chat
from workers.serving.engine.detokenizer import Vocabulary
from workers.serving.engine.memory import cache_bytes, free_bytes, weight_bytes
from workers.serving.engine.model_forward import forward_for
from workers.serving.engine.port import EngineStatus, SequenceRequest, Sink
from workers.serving.engine.slot_decoder import SlotDecoder
from workers.serving.generation import Chat


@dataclass(frozen=True)
class EngineOptions:
    """At most ``max_slots`` sequences at once, in ``kv_cache_bytes`` of keys and values. A request is taken while fewer than
    ``max_waiting`` sequences wait: with as many as there are slots, nobody waits for more than one round.
    """

    max_slots: int = 16
    kv_cache_bytes: int = 4 << 30
    max_waiting: int = 16


DEFAULTS = EngineOptions()


class TransformersEngine:
    """Loads the export in ``folder``: safetensors only, no network, no code from the folder.

    On a CPU it computes in float32 whatever the export is stored in; on a GPU in the stored type. ``threads``
    sets torch's intra-op threads for the whole process (0 leaves them): give it only in a process of the
    engine's own. Raises OSError or ValueError for a folder that is not such an export.
    """

    def __init__(self, folder: Path, threads: int = 0, options: EngineOptions = DEFAULTS) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        self._backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._backend is None:
            raise ValueError(f"{folder}: no tokenizer.json")
        self._backend.no_truncation()
        self._backend.no_padding()
        loading: Future[SlotDecoder] = Future()
        self._thread = threading.Thread(
            target=self._load_and_decode, args=(folder, threads, options, loading), name="decode", daemon=True
        )
        self._thread.start()
        self._decoder = loading.result()

    @property
    def context_length(self) -> int:
        return self._decoder.slot_tokens

    @property
    def vocab_size(self) -> int:
        return self._decoder.vocab_size

    def status(self) -> EngineStatus:
        return self._decoder.status(alive=self._thread.is_alive())

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
        return self._decoder.submit(sequences, sink)

    def close(self) -> None:
        self._decoder.close()

    def _load_and_decode(
        self, folder: Path, threads: int, options: EngineOptions, loading: "Future[SlotDecoder]"
    ) -> None:
        """All of torch's work is done by this one thread: OpenMP keeps a team for every thread that ever computed, and
        stops spinning in all of them where the teams have more threads than there are cores (10 M parameters, two
        cores: a fifth to a quarter less speed).
        """
        try:
            if threads:
                torch.set_num_threads(threads)
            decoder = self._load(folder, options)
        except BaseException as error:
            loading.set_exception(error)
            return
        loading.set_result(decoder)
        decoder.decode_until_closed()

    @torch.inference_mode()
    def _load(self, folder: Path, options: EngineOptions) -> SlotDecoder:
        device = _device()
        model: Any = load_model(folder, dtype="auto" if device.type == "cuda" else torch.float32)
        model.to(device).eval()
        config = model.config.get_text_config()
        context_length = getattr(config, "max_position_embeddings", None)
        if not context_length:
            raise ValueError(f"{folder}: config.json has no max_position_embeddings")
        forward = forward_for(
            model,
            max_slots=options.max_slots,
            slot_tokens=context_length,
            kv_cache_bytes=options.kv_cache_bytes,
        )
        return SlotDecoder(
            forward,
            Vocabulary(self._backend, type(self._backend.decoder).__name__),
            _end_tokens(model, self._tokenizer),
            config.vocab_size,
            max_waiting=options.max_waiting,
        )

    def _beginning(self) -> int:
        """The token an empty prompt stands for."""
        for id in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if id is not None:
                return int(id)
        return 0


class TransformersLoader:
    """Loads engines into this process."""

    def __init__(self, threads: int = 0, options: EngineOptions = DEFAULTS) -> None:
        self._threads = threads
        self._options = options

    def needed_bytes(self, folder: Path) -> int:
        device, options = _device(), self._options
        cache = cache_bytes(folder, device, num_slots=options.max_slots, most=options.kv_cache_bytes)
        return weight_bytes(folder, device) + cache

    def free_bytes(self) -> int:
        return free_bytes(_device())

    def load(self, folder: Path) -> TransformersEngine:
        return TransformersEngine(folder, self._threads, self._options)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a text, by the generation config, the model's config or the tokenizer."""
    ends: set[int] = set()
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        ends.update([value] if isinstance(value, int) else value or [])
    return frozenset(ends)
