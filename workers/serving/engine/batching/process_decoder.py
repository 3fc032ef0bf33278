"""Decodes in a separate process.

So this process's interpreter takes no time from the decoding thread, a version that hangs or is killed takes
nothing else down, and all of its memory is freed when it ends.
"""

import os
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from workers.serving.engine import processes
from workers.serving.engine.batching.decoder import DecoderLimits, DecoderStatus
from workers.serving.engine.batching.decoder_process import (
    Begin,
    Cancel,
    StepEvents,
    decode_for,
    receive,
    send,
)
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import (
    CLOSED,
    EngineError,
    EngineEvent,
    SequenceFailed,
    SequenceRequest,
    Sink,
)
from workers.serving.engine.step_clock import StepClock
from workers.serving.generation import Token

DIED = "the engine's process has died"

# Memory of a process besides weights and KV cache: interpreter pages that are no longer shared; on a GPU
# (H100), cuBLAS workspaces in addition to the context.
PROCESS_BYTES = {"cpu": 512 << 20, "cuda": 256 << 20}


class _OpenRequest:
    """A request's sink and the indices of its sequences that have not ended."""

    def __init__(self, sequences: Sequence[SequenceRequest], sink: Sink) -> None:
        self.sink = sink
        self.open_indices = {sequence.index for sequence in sequences}

    def update(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            if not isinstance(event, Token):
                self.open_indices.discard(event.index)


class ProcessDecoder:
    """Starts the process and waits until it has loaded the export.

    Raises what ``TransformersEngine`` raises, and EngineError if the process ends first.
    """

    def __init__(self, folder: Path, threads: int, options: EngineOptions, seconds: float | None) -> None:
        self._connection, child_connection = processes.context.Pipe()
        self._process = processes.context.Process(
            target=decode_for, args=(child_connection, folder, threads, options), name="decode", daemon=True
        )
        processes.start(self._process)
        child_connection.close()
        self.limits = self._receive_limits(seconds)
        self._clock = StepClock()
        self._cached_tokens = 0
        self._requests: dict[int, _OpenRequest] = {}
        self._newest = -1
        self._end_reason: str | None = None  # set once the decoder takes no more requests
        self._lock = threading.Lock()
        self._outgoing: queue.SimpleQueue[Begin | Cancel | None] = queue.SimpleQueue()
        threading.Thread(target=self._send_until_closed, name="send-to-decoder", daemon=True).start()
        threading.Thread(target=self._receive_until_closed, name="receive-from-decoder", daemon=True).start()

    def status(self) -> DecoderStatus:
        return DecoderStatus(
            alive=self._end_reason is None,
            stalled_seconds=self._clock.stalled_seconds,
            longest_step_seconds=self._clock.longest_seconds,
            cached_tokens=self._cached_tokens,
        )

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        with self._lock:
            if self._end_reason is not None:
                raise EngineError(self._end_reason)
            self._newest = number = self._newest + 1
            if not self._clock.stalled_seconds:
                self._clock.start()
            self._requests[number] = _OpenRequest(sequences, sink)
        self._outgoing.put(Begin(number, sequences))
        return lambda: self._cancel(number)

    def close(self) -> None:
        with self._lock:
            self._end_reason = self._end_reason or CLOSED
            if self._connection.closed:
                return
            # If the fork server has died, ``kill`` believes that the process is dead too, and does nothing. Shutting
            # down the socket ends it in any case.
            with socket.socket(fileno=os.dup(self._connection.fileno())) as duplicate, suppress(OSError):
                duplicate.shutdown(socket.SHUT_RDWR)
        self._process.kill()

    def _cancel(self, number: int) -> None:
        with self._lock:
            # The clock runs on: an engine that hangs does not recover because its clients leave.
            if self._requests.pop(number, None) is None:
                return
        self._outgoing.put(Cancel(number))

    def _receive_limits(self, seconds: float | None) -> DecoderLimits:
        try:
            ready = self._connection.poll(seconds)
            answer = receive(self._connection) if ready else TimeoutError(f"not loaded after {seconds:g} s")
        except (EOFError, OSError):
            answer = None
        if isinstance(answer, DecoderLimits):
            return answer
        self._process.kill()  # in case it has not ended
        self._process.join()
        self._connection.close()
        if isinstance(answer, Exception):
            raise answer
        raise EngineError(f"{DIED} (exit code {self._process.exitcode})")

    # Two threads, because a process that hangs must block neither its callers nor requests to other engines.

    def _send_until_closed(self) -> None:
        try:
            while (message := self._outgoing.get()) is not None:
                send(self._connection, message)
        except OSError:
            pass  # the process is gone, which the receiving thread notices too

    def _receive_until_closed(self) -> None:
        try:
            while isinstance(step := receive(self._connection), StepEvents):
                for sink, events in self._route(step):
                    sink(events)
        except (EOFError, OSError):
            pass
        self._process.join()
        self._outgoing.put(None)
        with self._lock:
            self._connection.close()
            self._end_reason = self._end_reason or f"{DIED} (exit code {self._process.exitcode})"
            open_requests = list(self._requests.values())
            self._requests.clear()
            self._clock.stop()
        for request in open_requests:
            request.sink([SequenceFailed(index, self._end_reason) for index in sorted(request.open_indices)])

    def _route(self, step: StepEvents) -> list[tuple[Sink, list[EngineEvent]]]:
        """Match a step's events with the sinks of their requests; drop events of cancelled requests."""
        routed = []
        with self._lock:
            self._clock.stop()
            self._cached_tokens = step.cached_tokens
            for number, events in step.events:
                if (request := self._requests.get(number)) is None:
                    continue
                request.update(events)
                if not request.open_indices:
                    del self._requests[number]
                routed.append((request.sink, events))
            if step.newest < self._newest or not step.idle:
                self._clock.start()
        return routed
