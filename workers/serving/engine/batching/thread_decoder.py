"""Decodes in a thread of this process."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from workers.serving.engine.batching.decoder import DecoderLimits, DecoderStatus
from workers.serving.engine.batching.decoder_loading import load_decoder
from workers.serving.engine.batching.slot_decoder import SlotDecoder
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import SequenceRequest, Sink
from workers.serving.engine.text.tokenizer import ExportTokenizer


class ThreadDecoder:
    """Loads and decodes in one daemon thread. Raises what ``TransformersEngine`` raises."""

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
    def limits(self) -> DecoderLimits:
        return self._decoder.limits

    def status(self) -> DecoderStatus:
        clock = self._decoder.clock
        return DecoderStatus(
            alive=self._thread.is_alive(),
            stalled_seconds=clock.stalled_seconds,
            longest_step_seconds=clock.longest_seconds,
            cached_tokens=self._decoder.cached_tokens,
        )

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        return self._decoder.submit(sequences, sink)

    def close(self) -> None:
        self._decoder.close()
