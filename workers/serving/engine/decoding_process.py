"""The process that decodes for one engine. ``process_decoding`` is the side that starts it and asks.

It hears ``Begin`` and ``Cancel``, and says ``DecodingSize`` or why it cannot load; then a ``Turn`` after every turn, and an
empty one whenever there is nothing to do: whatever it was asked, something follows. It ends when the other side does, by
kill -9 too.
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
    """What has come of a turn, by request. ``newest``: the last request that had been begun then, -1 for none; ``idle``: with
    nothing left to do.
    """

    events: Sequence[tuple[int, list[EngineEvent]]]
    cached_tokens: int
    newest: int
    idle: bool


def send(connection: Connection, message: object) -> None:
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> object:
    """Raises EOFError or OSError once the other side is gone."""
    return pickle.loads(connection.recv_bytes())  # of whom we started, or who started us


def decode_for(connection: Connection, folder: Path, threads: int, options: EngineOptions) -> None:
    """To the end of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for a whole terminal: who started this process ends it
    disable_progress_bar()  # it would also leave a semaphore behind, as this process is killed in the end
    loading: Future[_Requests] = Future()
    threading.Thread(target=_obey, args=(connection, loading), name="obey", daemon=True).start()
    try:
        decoder = load_decoder(folder, ExportTokenizer(folder), threads, options)
    except BaseException as error:
        send(connection, _crossing(error))
        return
    requests = _Requests(decoder)
    loading.set_result(requests)
    send(connection, decoder.size)
    decoder.decode_until_closed(report=lambda: send(connection, requests.turn()))


class _Requests:
    """Those that have not ended, with what cancels them, and what they have emitted since the last ``turn``."""

    def __init__(self, decoder: SlotDecoder) -> None:
        self._decoder = decoder
        self._newest = -1
        self._cancels: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._events: list[tuple[int, list[EngineEvent]]] = []  # the decoding thread's alone

    def begin(self, request: int, sequences: Sequence[SequenceRequest]) -> None:
        # It may be over before it is known how to cancel it, or be told of as over before it counts as the newest.
        with self._lock:
            self._cancels[request] = self._decoder.submit(sequences, self._sink(request, len(sequences)))
            self._newest = request

    def cancel(self, request: int) -> None:
        with self._lock:
            cancel = self._cancels.pop(request, None)
        if cancel is not None:
            cancel()

    def turn(self) -> Turn:
        """Called by the decoding thread."""
        newest = self._newest  # before it is looked whether something is left: what comes in between is
        events, self._events = self._events, []
        return Turn(events, self._decoder.cached_tokens, newest, self._decoder.is_idle)

    def _sink(self, request: int, num_left: int) -> Sink:
        def emit(events: list[EngineEvent]) -> None:
            nonlocal num_left
            num_left -= sum(not isinstance(event, Token) for event in events)
            if num_left == 0:
                with self._lock:
                    self._cancels.pop(request, None)
            self._events.append((request, events))

        return emit


def _obey(connection: Connection, loading: "Future[_Requests]") -> None:
    try:
        while True:
            message = receive(connection)
            requests = loading.result()
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
