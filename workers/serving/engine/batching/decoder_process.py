"""The process that decodes for one engine. ``process_decoder`` starts it and is its only client.

The process receives ``Begin`` and ``Cancel`` messages. It first sends ``DecoderLimits``, or the error that kept
it from loading; then ``StepEvents`` after every engine step, and empty ones whenever it becomes idle, so every
request is followed by some message. It ends when its client does, even by kill -9.
"""

import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from workers.serving.engine.batching.decoder_loading import load_decoder
from workers.serving.engine.batching.slot_decoder import SlotDecoder
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import EngineError, EngineEvent, SequenceRequest, Sink, num_ended
from workers.serving.engine.text.tokenizer import ExportTokenizer


@dataclass(frozen=True, slots=True)
class Begin:
    """Start the sequences of one request, which has a unique number."""

    request: int
    sequences: Sequence[SequenceRequest]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancel the sequences of one request."""

    request: int


@dataclass(frozen=True, slots=True)
class StepEvents:
    """The events of one engine step, by request.

    ``newest`` is the last request that had begun by then, -1 for none. ``idle``: no sequence is left.
    """

    events: Sequence[tuple[int, list[EngineEvent]]]
    cached_tokens: int
    newest: int
    idle: bool


def send(connection: Connection, message: object) -> None:
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> object:
    """Receive a message. Raises EOFError or OSError once the peer is gone."""
    return pickle.loads(connection.recv_bytes())  # the peer is our parent or our child


def decode_for(connection: Connection, folder: Path, threads: int, options: EngineOptions) -> None:
    """Main function of the process."""
    # Ctrl-C reaches every process on the terminal, but only the client may end this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    disable_progress_bar()  # it would leak a semaphore, because this process is killed in the end
    loading: Future[_Requests] = Future()
    threading.Thread(target=_receive_until_closed, args=(connection, loading), daemon=True).start()
    try:
        decoder = load_decoder(folder, ExportTokenizer(folder), threads, options)
    except BaseException as error:
        send(connection, _portable(error))
        return
    requests = _Requests(decoder)
    loading.set_result(requests)
    send(connection, decoder.limits)
    decoder.decode_until_closed(report=lambda: send(connection, requests.step_events()))


class _Requests:
    """The open requests: how to cancel them, and their events since the last ``step_events``."""

    def __init__(self, decoder: SlotDecoder) -> None:
        self._decoder = decoder
        self._newest = -1
        self._cancels: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._events: list[tuple[int, list[EngineEvent]]] = []  # only the decoding thread uses it

    def begin(self, request: int, sequences: Sequence[SequenceRequest]) -> None:
        # Under the lock: the request may end before ``_cancels`` has it, and must not be reported before it
        # is the newest.
        with self._lock:
            self._cancels[request] = self._decoder.submit(sequences, self._sink(request, len(sequences)))
            self._newest = request

    def cancel(self, request: int) -> None:
        with self._lock:
            cancel = self._cancels.pop(request, None)
        if cancel is not None:
            cancel()

    def step_events(self) -> StepEvents:
        """Called by the decoding thread."""
        newest = self._newest  # read before ``is_idle``: a request that begins in between is not idle
        events, self._events = self._events, []
        return StepEvents(events, self._decoder.cached_tokens, newest, self._decoder.is_idle)

    def _sink(self, request: int, num_open: int) -> Sink:
        def emit(events: list[EngineEvent]) -> None:
            nonlocal num_open
            num_open -= num_ended(events)
            if num_open == 0:
                with self._lock:
                    self._cancels.pop(request, None)
            self._events.append((request, events))

        return emit


def _receive_until_closed(connection: Connection, loading: "Future[_Requests]") -> None:
    try:
        while True:
            message = receive(connection)
            requests = loading.result()
            if isinstance(message, Begin):
                requests.begin(message.request, message.sequences)
            elif isinstance(message, Cancel):
                requests.cancel(message.request)
    except (EOFError, OSError):
        os._exit(1)  # the decoding thread may hang


def _portable(error: BaseException) -> BaseException:
    """The error as a type that the client can unpickle."""
    kind = next((kind for kind in (EngineError, OSError, ValueError) if isinstance(error, kind)), None)
    return EngineError(f"{type(error).__name__}: {error}") if kind is None else kind(str(error))
