"""Decoding in this process, on a thread of its own."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from workers.serving.engine.decoder_loading import load_decoder
from workers.serving.engine.decoding import DecodingSize, DecodingStatus
from workers.serving.engine.export_tokenizer import ExportTokenizer
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import SequenceRequest, Sink
from workers.serving.engine.slot_decoder import SlotDecoder


class ThreadDecoding:
    """Raises as ``TransformersEngine``."""

    def __init__(
        self, folder: Path, tokenizer: ExportTokenizer, threads: int, options: EngineOptions
    ) -> None:
        loading: Future[SlotDecoder] = Future()

        def load_and_decode() -> None:
            try:
                decoder = load_decoder(folder, tokenizer, threads, options)
            except BaseException as error:
                loading.set_exception(error)
                return
            loading.set_result(decoder)
            decoder.decode_until_closed()

        self._thread = threading.Thread(target=load_and_decode, name="decode", daemon=True)
        self._thread.start()
        self._decoder = loading.result()

    @property
    def size(self) -> DecodingSize:
        return self._decoder.size

    def status(self) -> DecodingStatus:
        turns = self._decoder.turns
        return DecodingStatus(
            alive=self._thread.is_alive(),
            stalled_seconds=turns.stalled_seconds,
            longest_turn_seconds=turns.longest_seconds,
            cached_tokens=self._decoder.cached_tokens,
        )

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        return self._decoder.submit(sequences, sink)

    def close(self) -> None:
        self._decoder.close()
