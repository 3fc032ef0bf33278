"""The default engine: an export in the Hugging Face layout on transformers, decoded with continuous batching."""

from collections.abc import Callable, Sequence
from pathlib import Path

from workers.serving.engine.admission import Admission, Admitted
from workers.serving.engine.decoding import Decoding
from workers.serving.engine.export_tokenizer import ExportTokenizer
from workers.serving.engine.memory import cache_bytes, free_bytes, this_device, weight_bytes
from workers.serving.engine.options import DEFAULTS, EngineOptions
from workers.serving.engine.port import EngineError, EngineEvent, EngineStatus, SequenceRequest, Sink
from workers.serving.engine.process_decoding import PROCESS_BYTES, ProcessDecoding
from workers.serving.engine.thread_decoding import ThreadDecoding
from workers.serving.generation import Chat, Token


class TransformersEngine:
    """Loads the export in ``folder``: safetensors only, no network, no code from the folder.

    On a CPU it computes in float32 whatever the export is stored in; on a GPU in the stored type. It decodes in a thread of
    this process, or in its ``own_process``. ``threads`` sets torch's intra-op threads for all of the process that decodes
    (0 leaves them). Raises OSError or ValueError for a folder that is not such an export, and TimeoutError where its own
    process has not loaded it after ``seconds``.
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
        self._decoding: Decoding = (
            ProcessDecoding(folder, threads, options, seconds)
            if own_process
            else ThreadDecoding(folder, self._tokenizer, threads, options)
        )
        self._size = self._decoding.size
        self._admission = Admission(self._size.num_slots, options.max_waiting)

    @property
    def context_length(self) -> int:
        return self._size.slot_tokens

    @property
    def vocab_size(self) -> int:
        return self._size.vocab_size

    def status(self) -> EngineStatus:
        status = self._decoding.status()
        return EngineStatus(
            alive=status.alive,
            stalled_seconds=status.stalled_seconds,
            longest_turn_seconds=status.longest_turn_seconds,
            num_running=self._admission.num_running,
            num_waiting=self._admission.num_waiting,
            cached_tokens=status.cached_tokens,
            cache_tokens=self._size.num_slots * self._size.slot_tokens,
        )

    def encode(self, text: str) -> tuple[int, ...]:
        return self._tokenizer.encode(text, self.context_length)

    def encode_chat(self, chat: Chat) -> tuple[tuple[int, ...], tuple[str, ...]]:
        return self._tokenizer.encode_chat(chat, self.context_length)

    def check_room(self) -> None:
        self._admission.check_room()

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        admitted = Admitted(self._admission, len(sequences))

        def emit(events: list[EngineEvent]) -> None:
            admitted.end(sum(not isinstance(event, Token) for event in events))
            sink(events)

        try:
            cancel = self._decoding.submit(sequences, emit)
        except EngineError:
            admitted.withdraw()
            raise

        def cancel_and_withdraw() -> None:
            admitted.withdraw()
            cancel()

        return cancel_and_withdraw

    def close(self) -> None:
        self._decoding.close()


class TransformersLoader:
    """Loads engines that decode in this process, or each in its ``own_process``."""

    def __init__(
        self, threads: int = 0, options: EngineOptions = DEFAULTS, *, own_process: bool = False
    ) -> None:
        self._threads = threads
        self._options = options
        self._own_process = own_process

    def needed_bytes(self, folder: Path) -> int:
        device, options = this_device(), self._options
        cache = cache_bytes(folder, device, num_slots=options.max_slots, most=options.kv_cache_bytes)
        return weight_bytes(folder, device) + cache + (PROCESS_BYTES[device.type] if self._own_process else 0)

    def free_bytes(self) -> int:
        return free_bytes(this_device())

    def load(self, folder: Path, seconds: float) -> TransformersEngine:
        own = self._own_process
        return TransformersEngine(folder, self._threads, self._options, own_process=own, seconds=seconds)
