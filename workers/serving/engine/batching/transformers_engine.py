"""The default engine: continuous batching on transformers, for exports in the Hugging Face layout."""

from collections.abc import Callable, Sequence
from pathlib import Path

from workers.serving.engine.batching.admission import AdmissionQueue, AdmittedRequest
from workers.serving.engine.batching.decoder import Decoder
from workers.serving.engine.batching.process_decoder import PROCESS_BYTES, ProcessDecoder
from workers.serving.engine.batching.thread_decoder import ThreadDecoder
from workers.serving.engine.memory import cache_bytes, free_bytes, this_device, weight_bytes
from workers.serving.engine.options import DEFAULTS, EngineOptions
from workers.serving.engine.port import (
    EngineError,
    EngineEvent,
    EngineStatus,
    SequenceRequest,
    Sink,
    num_ended,
)
from workers.serving.engine.text.tokenizer import ExportTokenizer
from workers.serving.generation import Chat


class TransformersEngine:
    """Loads the export in ``folder``: safetensors only, no network access, no code from the folder.

    On a CPU it computes in float32 whatever type is stored, on a GPU in the stored type. It decodes in a
    thread of this process, or in its ``own_process``. ``threads`` sets torch's intra-op threads for the whole
    decoding process; 0 keeps torch's default. Raises OSError or ValueError if the folder is not an export,
    and TimeoutError if its own process has not loaded it after ``seconds``.
    """

    def __init__(
        self,
        folder: Path,
        threads: int = 0,
        options: EngineOptions = DEFAULTS,
        *,
        own_process: bool = False,
        seconds: float | None = None,
    ) -> None:
        self._tokenizer = ExportTokenizer(folder)
        self._decoder: Decoder = (
            ProcessDecoder(folder, threads, options, seconds)
            if own_process
            else ThreadDecoder(folder, self._tokenizer, threads, options)
        )
        self._limits = self._decoder.limits
        self._admission = AdmissionQueue(self._limits.num_slots, options.max_waiting)

    @property
    def context_length(self) -> int:
        return self._limits.slot_tokens

    @property
    def vocab_size(self) -> int:
        return self._limits.vocab_size

    def status(self) -> EngineStatus:
        status = self._decoder.status()
        return EngineStatus(
            alive=status.alive,
            stalled_seconds=status.stalled_seconds,
            longest_step_seconds=status.longest_step_seconds,
            num_running=self._admission.num_running,
            num_waiting=self._admission.num_waiting,
            cached_tokens=status.cached_tokens,
            cache_tokens=self._limits.num_slots * self._limits.slot_tokens,
        )

    def encode(self, text: str) -> tuple[int, ...]:
        return self._tokenizer.encode(text, self.context_length)

    def encode_chat(self, chat: Chat) -> tuple[tuple[int, ...], tuple[str, ...]]:
        return self._tokenizer.encode_chat(chat, self.context_length)

    def check_room(self) -> None:
        self._admission.check_room()

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        admitted = AdmittedRequest(self._admission, len(sequences))

        def emit(events: list[EngineEvent]) -> None:
            admitted.end(num_ended(events))
            sink(events)

        try:
            cancel = self._decoder.submit(sequences, emit)
        except EngineError:
            admitted.withdraw()
            raise

        def cancel_and_withdraw() -> None:
            admitted.withdraw()
            cancel()

        return cancel_and_withdraw

    def close(self) -> None:
        self._decoder.close()


class TransformersLoader:
    """Loads engines that decode in this process, or each in its ``own_process``."""

    def __init__(
        self, threads: int = 0, options: EngineOptions = DEFAULTS, *, own_process: bool = False
    ) -> None:
        self._threads = threads
        self.options = options
        self._own_process = own_process

    def needed_bytes(self, folder: Path) -> int:
        device, options = this_device(), self.options
        cache = cache_bytes(folder, device, num_slots=options.max_slots, max_bytes=options.kv_cache_bytes)
        return weight_bytes(folder, device) + cache + (PROCESS_BYTES[device.type] if self._own_process else 0)

    def free_bytes(self) -> int:
        return free_bytes(this_device())

    def load(self, folder: Path, seconds: float) -> TransformersEngine:
        own = self._own_process
        return TransformersEngine(folder, self._threads, self.options, own_process=own, seconds=seconds)
