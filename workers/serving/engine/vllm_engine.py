"""The engine on vLLM, for GPUs: an ``AsyncLLMEngine``, whose model runs in a process of its own, on a thread with a loop.

Written against the sources of vLLM 0.33.0 and run with a build of 0.32.0 for CPUs; on a GPU it has not been run.
vLLM batches by itself: it is given everything that is taken, and what is more than its slots waits there.
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

from workers.serving.engine import vllm_library
from workers.serving.engine.admission import Admission
from workers.serving.engine.export_tokenizer import ExportTokenizer
from workers.serving.engine.memory import (
    cache_bytes,
    context_length,
    free_bytes,
    this_device,
    total_bytes,
    weight_bytes,
)
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
from workers.serving.engine.turns import Turns
from workers.serving.engine.vllm_requests import SequenceAnswer, engine_arguments
from workers.serving.generation import Chat, Sampling

logger = logging.getLogger(__name__)

DEFAULTS = EngineOptions(max_slots=256, max_waiting=256)  # its cache has pages: a slot costs what it holds
NUMBER_BYTES = 2  # of weights: it computes what is stored in float32 in bfloat16 (``dtype`` "auto")
PROMPT_RATE = (
    8192.0  # tokens per second at least: while it reads a prompt, one after another, it says nothing
)
OVERHEAD_BYTES = 2 << 30  # the context of its process, activations, CUDA graphs: an estimate


@dataclass(eq=False)
class _Sequence:
    request: SequenceRequest
    sink: Sink
    answer: SequenceAnswer
    task: asyncio.Task[None] | None = None


class VllmEngine:
    """Loads the export in ``folder``: safetensors only, no network, no code from the folder. Raises OSError or ValueError
    for a folder that is not such an export, EngineError where vLLM cannot serve it, and TimeoutError where what it has loaded
    has not answered after ``seconds``; how long its process may take to start, vLLM decides (VLLM_ENGINE_READY_TIMEOUT_S).
    """

    def __init__(self, folder: Path, options: EngineOptions = DEFAULTS, seconds: float | None = None) -> None:
        if not vllm_library.is_installed():
            raise EngineError(vllm_library.NOT_INSTALLED)
        deadline = None if seconds is None else time.monotonic() + seconds
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        self._tokenizer = ExportTokenizer(folder)
        self._vocabulary = self._tokenizer.vocabulary()
        self._context_length, self._vocab_size = context_length(text), int(text.vocab_size)
        ends = self._tokenizer.end_tokens(_generation_config(folder), config)
        self._end_tokens = frozenset(end for end in ends if end < self._vocab_size)  # vLLM refuses others
        self._admission = Admission(options.max_slots, options.max_waiting)
        self._numbers = count()
        self._turns = Turns()
        self._in_flight: dict[_Sequence, None] = {}  # in the order in which they came
        self._closing = False
        self._lock = threading.Lock()
        self._engine: Any = None  # while its process runs
        self._cache_tokens = 0
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        arguments = engine_arguments(
            folder,
            options,
            context_length=self._context_length,
            cache_bytes=_cache_bytes(folder, options),
            memory_share=min(_needed_bytes(folder, options) / total_bytes(this_device()), 1.0),
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
            raise EngineError(f"vLLM cannot load it: {error}") from error
        self._try(None if deadline is None else max(deadline - time.monotonic(), 0.0))

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
        unread = max((len(s.request.prompt) for s in in_flight if not s.answer.num_tokens), default=0)
        return EngineStatus(
            alive=engine is not None and not engine.errored,
            stalled_seconds=max(self._turns.stalled_seconds - unread / PROMPT_RATE, 0.0),
            longest_turn_seconds=self._turns.longest_seconds,
            num_running=self._admission.num_running,
            num_waiting=self._admission.num_waiting,
            cached_tokens=min(sum(sequence.answer.num_tokens for sequence in in_flight), cache_tokens),
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
            _Sequence(request, sink, SequenceAnswer(request, self._vocabulary, self._end_tokens))
            for request in requests
        ]
        with self._lock:
            if self._closing:
                raise EngineError(CLOSED)
            self._admission.admit(len(sequences))
            self._in_flight.update(dict.fromkeys(sequences))
            self._loop.call_soon_threadsafe(self._begin, sequences)
        return lambda: self._cancel(sequences)

    def close(self) -> None:
        with self._lock:
            if not self._closing:
                self._closing = True
                self._loop.call_soon_threadsafe(self._stop.set)

    def _cancel(self, sequences: Sequence[_Sequence]) -> None:
        """They make room at once; vLLM is told as soon as the loop comes to it."""
        with self._lock:
            left = [sequence for sequence in sequences if sequence in self._in_flight]
            for sequence in left:
                self._over(sequence)
            if left and not self._closing:
                self._loop.call_soon_threadsafe(self._end, left)

    def _try(self, seconds: float | None) -> None:
        """Have it sample one token. Raises EngineError, e.g. where its logits are not finite, and TimeoutError."""
        tried: Future[list[EngineEvent]] = Future()
        self.submit(
            [SequenceRequest(0, (0,), 1, 0, Sampling(max_tokens=1, temperature=0.0))], tried.set_result
        )
        try:
            events = tried.result(seconds)
            failed = next((event for event in events if isinstance(event, SequenceFailed)), None)
            if failed is not None:
                raise EngineError(failed.message)
        except (EngineError, TimeoutError):
            self.close()
            raise

    def _over(self, sequence: _Sequence) -> None:
        """Under the lock."""
        del self._in_flight[sequence]
        self._admission.end()

    # --- the thread with the loop ------------------------------------------------------------------------------------

    async def _run(self, arguments: dict[str, Any], starting: "Future[asyncio.AbstractEventLoop]") -> None:
        try:
            self._engine = vllm_library.start_engine(arguments)
        except BaseException as error:
            starting.set_exception(error)
            return
        self._cache_tokens = self._engine.vllm_config.cache_config.kv_cache_size_tokens or 0
        starting.set_result(asyncio.get_running_loop())
        await self._stop.wait()
        with self._lock:
            left = list(self._in_flight)
            self._in_flight.clear()
        for sequence in left:
            sequence.sink([SequenceFailed(sequence.request.index, CLOSED)])
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        engine, self._engine = self._engine, None
        engine.shutdown()

    def _begin(self, sequences: Sequence[_Sequence]) -> None:
        for sequence in sequences:
            if sequence in self._in_flight:
                sequence.task = asyncio.create_task(self._decode(sequence))
                self._tasks.add(sequence.task)
                sequence.task.add_done_callback(self._tasks.discard)
        if self._in_flight and not self._turns.stalled_seconds:
            self._turns.begin()

    def _end(self, sequences: Sequence[_Sequence]) -> None:
        for sequence in sequences:
            if sequence.task is not None:
                sequence.task.cancel()  # ``generate`` aborts what it is cancelled in
        self._rest()

    def _turn(self) -> None:
        """vLLM has said something."""
        self._turns.end()
        if self._in_flight:
            self._turns.begin()

    def _rest(self) -> None:
        """While something is in flight the turn goes on: an engine that hangs is not well because somebody leaves."""
        if not self._in_flight:
            self._turns.forget()

    async def _decode(self, sequence: _Sequence) -> None:
        """To its end, or until it is cancelled."""
        try:
            if sequence.answer.needs_no_model:
                self._emit(sequence, sequence.answer.without_model())
            else:
                await self._generate(sequence)
        except Exception as error:  # it is this sequence's: others are still answered
            logger.exception("a sequence failed")
            # ``generate`` wraps what it does not expect.
            cause = error if isinstance(error, EngineError) else error.__cause__ or error
            failed = SequenceFailed(sequence.request.index, f"{type(cause).__name__}: {cause}")
            self._emit(sequence, [failed], over=True)

    async def _generate(self, sequence: _Sequence) -> None:
        answer = sequence.answer
        prompt, parameters = vllm_library.parameters(sequence.request, self._end_tokens)
        outputs = self._engine.generate(prompt, parameters, str(next(self._numbers)))
        async with aclosing(outputs):
            async for output in outputs:
                self._turn()
                if not answer.over:
                    self._emit(sequence, answer.take(output))
                if answer.over and not output.finished:
                    return  # a stop string, of which vLLM knows nothing: closing ``outputs`` aborts

    def _emit(self, sequence: _Sequence, events: list[EngineEvent], *, over: bool = False) -> None:
        """Pass events on, unless it was cancelled meanwhile."""
        with self._lock:
            if sequence not in self._in_flight:
                return
            ends = over or sequence.answer.over
            if ends:
                self._over(sequence)
        self._rest()
        if events:
            sequence.sink(events)


class VllmLoader:
    """Loads engines, each with a process of its own. What is missing for it is said when one is loaded."""

    def __init__(self, options: EngineOptions = DEFAULTS) -> None:
        self._options = options

    def needed_bytes(self, folder: Path) -> int:
        return _needed_bytes(folder, self._options)

    def free_bytes(self) -> int:
        return free_bytes(this_device())

    def load(self, folder: Path, seconds: float) -> VllmEngine:
        return VllmEngine(folder, self._options, seconds)


def _generation_config(folder: Path) -> Any:
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:  # none there: the model's config says what ends a text
        return None


def _cache_bytes(folder: Path, options: EngineOptions) -> int:
    """One sequence more than asked for: pages are not filled, and vLLM keeps one back."""
    return cache_bytes(folder, this_device(), num_slots=options.max_slots + 1, most=options.kv_cache_bytes)


def _needed_bytes(folder: Path, options: EngineOptions) -> int:
    weights = weight_bytes(folder, this_device(), widest=NUMBER_BYTES)
    return weights + _cache_bytes(folder, options) + OVERHEAD_BYTES
