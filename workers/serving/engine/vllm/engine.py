"""The engine on vLLM, for GPUs: an ``AsyncLLMEngine`` on an event loop in a thread.

Written against the sources of vLLM 0.33.0 and tested with a CPU build of 0.32.0, but not yet on a GPU. vLLM
does the batching: it receives all admitted sequences, and those beyond its slots wait there.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from workers.serving.engine.batching.admission import AdmissionQueue
from workers.serving.engine.memory import context_length, this_device, total_bytes
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import (
    CLOSED,
    EngineError,
    EngineEvent,
    EngineStatus,
    SequenceFailed,
    SequenceRequest,
    Sink,
)
from workers.serving.engine.step_clock import StepClock
from workers.serving.engine.text.tokenizer import ExportTokenizer
from workers.serving.engine.vllm import library
from workers.serving.engine.vllm.arguments import engine_arguments
from workers.serving.engine.vllm.outputs import SequenceOutputs
from workers.serving.engine.vllm.sizing import DEFAULTS, cache_bytes, needed_bytes
from workers.serving.generation import Chat, Sampling

logger = logging.getLogger(__name__)

# Tokens per second, a lower bound: vLLM reports nothing while it reads the prompts, one after another.
PREFILL_RATE = 8192.0


@dataclass(eq=False)
class _Sequence:
    request: SequenceRequest
    sink: Sink
    outputs: SequenceOutputs
    task: asyncio.Task[None] | None = None


class VllmEngine:
    """Loads the export in ``folder``: safetensors only, no network access, no code from the folder.

    Raises OSError or ValueError if the folder is not an export, EngineError if vLLM cannot serve it, and
    TimeoutError if the loaded engine does not answer within ``seconds``. VLLM_ENGINE_READY_TIMEOUT_S limits
    the start of vLLM's process.
    """

    def __init__(self, folder: Path, options: EngineOptions = DEFAULTS, seconds: float | None = None) -> None:
        if not library.is_installed():
            raise EngineError(library.NOT_INSTALLED)
        deadline = None if seconds is None else time.monotonic() + seconds
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text_config = config.get_text_config()
        self._tokenizer = ExportTokenizer(folder)
        self._vocabulary = self._tokenizer.vocabulary()
        self._context_length, self._vocab_size = context_length(text_config), int(text_config.vocab_size)
        ends = self._tokenizer.end_tokens(_generation_config(folder), config)
        self._end_tokens = frozenset(end for end in ends if end < self._vocab_size)  # vLLM rejects others
        self._admission = AdmissionQueue(options.max_slots, options.max_waiting)
        self._numbers = count()
        self._clock = StepClock()
        self._in_flight: dict[_Sequence, None] = {}  # in order of arrival
        self._closing = False
        self._lock = threading.Lock()
        self._engine: Any = None  # set while vLLM's process runs
        self._cache_tokens = 0
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        arguments = engine_arguments(
            folder,
            options,
            context_length=self._context_length,
            cache_bytes=cache_bytes(folder, options),
            memory_share=min(needed_bytes(folder, options) / total_bytes(this_device()), 1.0),
        )
        starting: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run(arguments, starting)), name="vllm", daemon=True
        )
        self._thread.start()
        try:
            self._loop = starting.result()
        except (OSError, ValueError):
            raise
        except Exception as error:
            raise EngineError(f"vLLM cannot load the model: {error}") from error
        self._sample_one_token(None if deadline is None else max(deadline - time.monotonic(), 0.0))

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def status(self) -> EngineStatus:
        with self._lock:
            in_flight = list(self._in_flight)
        engine, cache_tokens = self._engine, self._cache_tokens
        num_unread = max((len(s.request.prompt) for s in in_flight if not s.outputs.num_tokens), default=0)
        return EngineStatus(
            alive=engine is not None and not engine.errored,
            stalled_seconds=max(self._clock.stalled_seconds - num_unread / PREFILL_RATE, 0.0),
            longest_step_seconds=self._clock.longest_seconds,
            num_running=self._admission.num_running,
            num_waiting=self._admission.num_waiting,
            cached_tokens=min(sum(sequence.outputs.num_tokens for sequence in in_flight), cache_tokens),
            cache_tokens=cache_tokens,
        )

    def encode(self, text: str) -> tuple[int, ...]:
        return self._tokenizer.encode(text, self.context_length)

    def encode_chat(self, chat: Chat) -> tuple[tuple[int, ...], tuple[str, ...]]:
        return self._tokenizer.encode_chat(chat, self.context_length)

    def check_room(self) -> None:
        self._admission.check_room()

    def submit(self, requests: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        sequences = [
            _Sequence(request, sink, SequenceOutputs(request, self._vocabulary, self._end_tokens))
            for request in requests
        ]
        with self._lock:
            if self._closing:
                raise EngineError(CLOSED)
            self._admission.admit(len(sequences))
            self._in_flight.update(dict.fromkeys(sequences))
            self._loop.call_soon_threadsafe(self._start_tasks, sequences)
        return lambda: self._cancel(sequences)

    def close(self) -> None:
        with self._lock:
            if not self._closing:
                self._closing = True
                self._loop.call_soon_threadsafe(self._stop.set)

    def _cancel(self, sequences: Sequence[_Sequence]) -> None:
        """Make room at once; the event loop aborts the sequences in vLLM later."""
        with self._lock:
            cancelled = [sequence for sequence in sequences if sequence in self._in_flight]
            for sequence in cancelled:
                self._remove(sequence)
            if cancelled and not self._closing:
                self._loop.call_soon_threadsafe(self._cancel_tasks, cancelled)

    def _sample_one_token(self, seconds: float | None) -> None:
        """Test the engine. Raises EngineError, e.g. if its logits are not finite, or TimeoutError."""
        first: Future[list[EngineEvent]] = Future()
        self.submit(
            [SequenceRequest(0, (0,), 1, 0, Sampling(max_tokens=1, temperature=0.0))], first.set_result
        )
        try:
            events = first.result(seconds)
            failed = next((event for event in events if isinstance(event, SequenceFailed)), None)
            if failed is not None:
                raise EngineError(failed.message)
        except (EngineError, TimeoutError):
            self.close()
            raise

    def _remove(self, sequence: _Sequence) -> None:
        """End a sequence. The caller holds the lock."""
        del self._in_flight[sequence]
        self._admission.end()

    # Everything below runs on the event loop.

    async def _run(self, arguments: dict[str, Any], starting: "Future[asyncio.AbstractEventLoop]") -> None:
        try:
            self._engine = library.start_engine(arguments)
        except BaseException as error:
            starting.set_exception(error)
            return
        self._cache_tokens = self._engine.vllm_config.cache_config.kv_cache_size_tokens or 0
        starting.set_result(asyncio.get_running_loop())
        await self._stop.wait()
        with self._lock:
            in_flight = list(self._in_flight)
            self._in_flight.clear()
        for sequence in in_flight:
            sequence.sink([SequenceFailed(sequence.request.index, CLOSED)])
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        engine, self._engine = self._engine, None
        engine.shutdown()

    def _start_tasks(self, sequences: Sequence[_Sequence]) -> None:
        for sequence in sequences:
            if sequence in self._in_flight:
                sequence.task = asyncio.create_task(self._decode(sequence))
                self._tasks.add(sequence.task)
                sequence.task.add_done_callback(self._tasks.discard)
        if self._in_flight and not self._clock.stalled_seconds:
            self._clock.start()

    def _cancel_tasks(self, sequences: Sequence[_Sequence]) -> None:
        for sequence in sequences:
            if sequence.task is not None:
                sequence.task.cancel()  # vLLM's ``generate`` aborts its request when cancelled
        self._stop_clock_if_idle()

    def _stop_clock_if_idle(self) -> None:
        """Stop the clock if nothing is in flight.

        Otherwise it runs on: an engine that hangs does not recover because one client leaves.
        """
        if not self._in_flight:
            self._clock.cancel()

    async def _decode(self, sequence: _Sequence) -> None:
        """Decode one sequence until it ends or is cancelled."""
        try:
            if sequence.outputs.needs_no_model:
                self._emit(sequence, sequence.outputs.events_without_model())
            else:
                await self._generate(sequence)
        except Exception as error:  # fails this sequence only
            logger.exception("a sequence failed")
            # ``generate`` wraps unexpected exceptions.
            cause = error if isinstance(error, EngineError) else error.__cause__ or error
            failed = SequenceFailed(sequence.request.index, f"{type(cause).__name__}: {cause}")
            self._emit(sequence, [failed], ends=True)

    async def _generate(self, sequence: _Sequence) -> None:
        collected = sequence.outputs
        prompt, parameters = library.prompt_and_parameters(sequence.request, self._end_tokens)
        stream = self._engine.generate(prompt, parameters, str(next(self._numbers)))
        async with aclosing(stream):
            async for output in stream:
                self._clock.stop()
                if self._in_flight:
                    self._clock.start()
                if not collected.finished:
                    self._emit(sequence, collected.take(output))
                if collected.finished and not output.finished:
                    return  # our stop string, which vLLM does not know: closing the stream aborts the request

    def _emit(self, sequence: _Sequence, events: list[EngineEvent], *, ends: bool = False) -> None:
        """Pass events on, unless the sequence has been cancelled."""
        with self._lock:
            if sequence not in self._in_flight:
                return
            if ends or sequence.outputs.finished:
                self._remove(sequence)
        self._stop_clock_if_idle()
        if events:
            sequence.sink(events)


def _generation_config(folder: Path) -> Any:
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # the export has none; the model's config names the end tokens
        return None
