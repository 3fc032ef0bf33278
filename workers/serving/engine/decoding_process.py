"""The process that decodes for one engine. ``process_decoding`` is the side that starts it and asks.

It hears ``Begin`` and ``Cancel``, and says ``DecodingSize`` or why it cannot load; then, after every turn, a ``Turn``. It
ends when the other side does, by kill -9 too.
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

from workers.serving.engine.decoder_loading import load_decoder
from workers.serving.engine.export_tokenizer import ExportTokenizer
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import EngineError, EngineEvent, SequenceRequest, Sink
from workers.serving.engine.slot_decoder import SlotDecoder
from workers.serving.generation import Token


@dataclass(frozen=True, slots=True)
class Begin:
    """The sequences of one request, which has a number of its own."""

    request: int
    sequences: Sequence[SequenceRequest]


@dataclass(frozen=True, slots=True)
class Cancel:
    request: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What has come of a turn, by request."""

    events: Sequence[tuple[int, list[EngineEvent]]]
    cached_tokens: int


def send(connection: Connection, message: object) -> None:
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> object:
    """Raises EOFError or OSError once the other side is gone."""
    return pickle.loads(connection.recv_bytes())  # of whom we started, or who started us


def decode_for(connection: Connection, folder: Path, threads: int, options: EngineOptions) -> None:
    """To the end of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for a whole terminal: who started this process ends it
    disable_progress_bar()  # it would also leave a semaphore behind, as this process is killed in the end
    loading: Future[SlotDecoder] = Future()
    turn = _ThisTurn()
    threading.Thread(target=_obey, args=(connection, loading, turn), name="obey", daemon=True).start()
    try:
        decoder = load_decoder(folder, ExportTokenizer(folder), threads, options)
    except BaseException as error:
        send(connection, _crossing(error))
        return
    loading.set_result(decoder)
    send(connection, decoder.size)
    decoder.decode_until_closed(after_turn=lambda: send(connection, turn.take(decoder.cached_tokens)))


class _ThisTurn:
    """What the sequences of the running turn have emitted. Used by the decoding thread alone."""

    def __init__(self) -> None:
        self._events: list[tuple[int, list[EngineEvent]]] = []

    def put(self, request: int, events: list[EngineEvent]) -> None:
        self._events.append((request, events))

    def take(self, cached_tokens: int) -> Turn:
        events, self._events = self._events, []
        return Turn(events, cached_tokens)


class _Requests:
    """Those that have not ended, with what cancels them."""

    def __init__(self, decoder: SlotDecoder, turn: _ThisTurn) -> None:
        self._decoder = decoder
        self._turn = turn
        self._cancels: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()

    def begin(self, request: int, sequences: Sequence[SequenceRequest]) -> None:
        with self._lock:  # it may be over before it is known how to cancel it
            self._cancels[request] = self._decoder.submit(sequences, self._sink(request, len(sequences)))

    def cancel(self, request: int) -> None:
        with self._lock:
            cancel = self._cancels.pop(request, None)
        if cancel is not None:
            cancel()

    def _sink(self, request: int, num_left: int) -> Sink:
        def emit(events: list[EngineEvent]) -> None:
            nonlocal num_left
            num_left -= sum(not isinstance(event, Token) for event in events)
            if num_left == 0:
                with self._lock:
                    self._cancels.pop(request, None)
            self._turn.put(request, events)

        return emit


def _obey(connection: Connection, loading: "Future[SlotDecoder]", turn: _ThisTurn) -> None:
    requests: _Requests | None = None
    try:
        while True:
            message = receive(connection)
            requests = requests or _Requests(loading.result(), turn)
            if isinstance(message, Begin):
                requests.begin(message.request, message.sequences)
            elif isinstance(message, Cancel):
                requests.cancel(message.request)
    except (EOFError, OSError):
        os._exit(1)  # the decoding thread may never come back


def _crossing(error: BaseException) -> BaseException:
    """An error that the other side can read."""
    known = next((kind for kind in (EngineError, OSError, ValueError) if isinstance(error, kind)), None)
    return EngineError(f"{type(error).__name__}: {error}") if known is None else known(str(error))
