"""The default engine: an export in the Hugging Face layout on transformers, in this process, on one decode thread."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from workers.pretrained import load_model
from workers.serving.engine.export_tokenizer import ExportTokenizer
from workers.serving.engine.memory import cache_bytes, context_length, free_bytes, this_device, weight_bytes
from workers.serving.engine.model_forward import forward_for
from workers.serving.engine.options import DEFAULTS, EngineOptions
from workers.serving.engine.port import EngineStatus, SequenceRequest, Sink
from workers.serving.engine.slot_decoder import SlotDecoder
from workers.serving.generation import Chat


class TransformersEngine:
    """Loads the export in ``folder``: safetensors only, no network, no code from the folder.

    On a CPU it computes in float32 whatever the export is stored in; on a GPU in the stored type. ``threads``
    sets torch's intra-op threads for the whole process (0 leaves them): give it only in a process of the
    engine's own. Raises OSError or ValueError for a folder that is not such an export.
    """

    def __init__(self, folder: Path, threads: int = 0, options: EngineOptions = DEFAULTS) -> None:
        self._tokenizer = ExportTokenizer(folder)
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
        return self._tokenizer.encode(text)

    def encode_chat(self, chat: Chat) -> tuple[tuple[int, ...], tuple[str, ...]]:
        return self._tokenizer.encode_chat(chat)

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
        device = this_device()
        model: Any = load_model(folder, dtype="auto" if device.type == "cuda" else torch.float32)
        model.to(device).eval()
        config = model.config.get_text_config()
        forward = forward_for(
            model,
            max_slots=options.max_slots,
            slot_tokens=context_length(config),
            kv_cache_bytes=options.kv_cache_bytes,
        )
        return SlotDecoder(
            forward,
            self._tokenizer.vocabulary(),
            self._tokenizer.end_tokens(model.generation_config, model.config),
            config.vocab_size,
            max_waiting=options.max_waiting,
        )


class TransformersLoader:
    """Loads engines into this process."""

    def __init__(self, threads: int = 0, options: EngineOptions = DEFAULTS) -> None:
        self._threads = threads
        self._options = options

    def needed_bytes(self, folder: Path) -> int:
        device, options = this_device(), self._options
        cache = cache_bytes(folder, device, num_slots=options.max_slots, most=options.kv_cache_bytes)
        return weight_bytes(folder, device) + cache

    def free_bytes(self) -> int:
        return free_bytes(this_device())

    def load(self, folder: Path) -> TransformersEngine:
        return TransformersEngine(folder, self._threads, self._options)
