"""Decoding in a process of its own: whatever else this one does, its interpreter takes nothing from the decoding thread; a
version that hangs or that the kernel kills ends alone; and all of its memory comes back.
"""

import os
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from workers.serving.engine import processes
from workers.serving.engine.decoding import DecodingSize, DecodingStatus
from workers.serving.engine.decoding_process import Begin, Cancel, Turn, decode_for, receive, send
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import (
    CLOSED,
    EngineError,
    EngineEvent,
    SequenceFailed,
    SequenceRequest,
    Sink,
)
from workers.serving.engine.turns import Turns
from workers.serving.generation import Token

DIED = "the engine's process has died"

# What a process takes beside weights and cache: pages of the interpreter that it no longer shares; on a GPU (H100) what products
# work in, beside its context.
PROCESS_BYTES = {"cpu": 512 << 20, "cuda": 256 << 20}


class _Request:
    def __init__(self, sequences: Sequence[SequenceRequest], sink: Sink) -> None:
        self.sink = sink
        self.left = {sequence.index for sequence in sequences}

    def took(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            if not isinstance(event, Token):
                self.left.discard(event.index)


class ProcessDecoding:
    """Raises as ``TransformersEngine``, and EngineError where the process ends before it has loaded."""

    def __init__(self, folder: Path, threads: int, options: EngineOptions, seconds: float | None) -> None:
        self._connection, theirs = processes.context.Pipe()
        self._process = processes.context.Process(
            target=decode_for, args=(theirs, folder, threads, options), name="decode", daemon=True
        )
        processes.start(self._process)
        theirs.close()
        self.size = self._loaded(seconds)
        self._turns = Turns()
        self._cached_tokens = 0
        self._requests: dict[int, _Request] = {}
        self._newest = -1
        self._ended: str | None = None  # why there will be nothing more
        self._lock = threading.Lock()
        self._outgoing: queue.SimpleQueue[Begin | Cancel | None] = queue.SimpleQueue()
        threading.Thread(target=self._ask, name="ask-decode", daemon=True).start()
        threading.Thread(target=self._pass_on, name="hear-decode", daemon=True).start()

    def status(self) -> DecodingStatus:
        return DecodingStatus(
            alive=self._ended is None,
            stalled_seconds=self._turns.stalled_seconds,
            longest_turn_seconds=self._turns.longest_seconds,
            cached_tokens=self._cached_tokens,
        )

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        with self._lock:
            if self._ended is not None:
                raise EngineError(self._ended)
            self._newest = number = self._newest + 1
            if not self._turns.stalled_seconds:
                self._turns.begin()
            self._requests[number] = _Request(sequences, sink)
        self._outgoing.put(Begin(number, sequences))
        return lambda: self._cancel(number)

    def close(self) -> None:
        with self._lock:
            self._ended = self._ended or CLOSED
            if self._connection.closed:
                return
            # Where the process that forked it has died, ``kill`` takes it for dead too. It ends by this as well.
            with socket.socket(fileno=os.dup(self._connection.fileno())) as ours, suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)
        self._process.kill()

    def _cancel(self, number: int) -> None:
        with self._lock:
            # The turn goes on: an engine that hangs is not well because nobody waits for it.
            if self._requests.pop(number, None) is None:
                return
        self._outgoing.put(Cancel(number))

    def _loaded(self, seconds: float | None) -> DecodingSize:
        try:
            answers = self._connection.poll(seconds)
            answer = receive(self._connection) if answers else TimeoutError(f"not loaded after {seconds:g} s")
        except (EOFError, OSError):
            answer = None
        if isinstance(answer, DecodingSize):
            return answer
        self._process.kill()  # where it has not come to its end
        self._process.join()
        self._connection.close()
        if isinstance(answer, Exception):
            raise answer
        raise EngineError(f"{DIED} (exit code {self._process.exitcode})")

    # --- two threads: a process that hangs must not hold whoever asks it or waits for another ------------------------------

    def _ask(self) -> None:
        try:
            while (message := self._outgoing.get()) is not None:
                send(self._connection, message)
        except OSError:
            pass  # it is gone, which the other thread sees too

    def _pass_on(self) -> None:
        try:
            while isinstance(turn := receive(self._connection), Turn):
                for sink, events in self._take(turn):
                    sink(events)
        except (EOFError, OSError):
            pass
        self._process.join()
        self._outgoing.put(None)
        with self._lock:
            self._connection.close()
            self._ended = self._ended or f"{DIED} (exit code {self._process.exitcode})"
            left = list(self._requests.values())
            self._requests.clear()
            self._turns.end()
        for request in left:
            request.sink([SequenceFailed(index, self._ended) for index in sorted(request.left)])

    def _take(self, turn: Turn) -> list[tuple[Sink, list[EngineEvent]]]:
        """For whom the events are: for nobody, where a request has been cancelled meanwhile."""
        taken = []
        with self._lock:
            self._turns.end()
            self._cached_tokens = turn.cached_tokens
            for number, events in turn.events:
                if (request := self._requests.get(number)) is None:
                    continue
                request.took(events)
                if not request.left:
                    del self._requests[number]
                taken.append((request.sink, events))
            if turn.newest < self._newest or not turn.idle:
                self._turns.begin()
        return taken
