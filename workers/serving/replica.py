"""What one replica answers with: a model version, swapped for another while requests go on.

A new target is loaded and warmed in a background thread beside the engine that answers; then the pointer
moves. A request takes the engine it finds and keeps it to its end, so an answer never mixes versions; the old
engine is closed when the last such request ends. A target that cannot be loaded leaves everything as it was
and is tried again later.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from service.core.serving import ReplicaReport
from workers.serving.engine.port import (
    Engine,
    EngineError,
    EngineEvent,
    QueueFull,
    SequenceFailed,
    SequenceRequest,
)
from workers.serving.generation import (
    Answer,
    Finished,
    Generation,
    RequestRefused,
    Sampling,
    Started,
    failed,
    not_ready,
    overloaded,
)
from workers.serving.prompting import plan_sequences

logger = logging.getLogger(__name__)

WARM_UP_TOKENS = 4
RETRY_SECONDS = 30.0  # a load may fail for want of memory or of the artifact store for a moment


@dataclass(frozen=True)
class Target:
    number: int
    key: str


@dataclass(eq=False)
class _Loaded:
    target: Target
    engine: Engine
    in_flight: int = 0
    retired: bool = False


class Replica:
    """Answers for one model line. ``open_export`` verifies and gives the folder of a key; ``load`` makes an
    engine of it.
    """

    def __init__(
        self,
        replica: str,
        open_export: Callable[[str], Path],
        load: Callable[[Path], Engine],
        *,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._replica = replica
        self._open_export = open_export
        self._load = load
        self._retry_seconds = retry_seconds
        self._current: _Loaded | None = None
        self._target: Target | None = None
        self._failure: tuple[Target, str] | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._loader = threading.Thread(target=self._load_until_closed, name=f"load-{replica}", daemon=True)
        self._loader.start()

    def set_target(self, number: int | None, key: str | None) -> None:
        """Make a version desired and return at once; the latest call wins, the same target again changes
        nothing.
        """
        target = Target(number, key) if number is not None and key is not None else None
        with self._changed:
            if target == self._target:
                return
            self._target = target
            self._failure = None
            if target is None:
                self._swap(None)
            self._changed.notify_all()

    def wait_until_settled(self, timeout_seconds: float | None = None) -> bool:
        """Wait until the target is answered with or has failed once. False when the time is over."""
        with self._changed:
            return self._changed.wait_for(lambda: self._settled() or self._closing, timeout_seconds)

    def report(self) -> ReplicaReport:
        with self._changed:
            number = None if self._current is None else self._current.target.number
            if self._failure is None:
                return ReplicaReport(self._replica, number)
            target, error = self._failure
            return ReplicaReport(self._replica, number, failed_number=target.number, error=error)

    def healthy(self) -> bool:
        with self._changed:
            return self._loader.is_alive() and (self._current is None or self._current.engine.alive)

    async def generate(self, request: Generation) -> AsyncGenerator[list[Answer], None]:
        """Answer one request with one version, in batches of whatever is ready; all at once unless it
        streams.
        """
        try:
            loaded = self._take(request.model)
        except RequestRefused as refusal:
            yield [refusal.refused]
            return
        try:
            async with aclosing(_decode(loaded, request)) as batches:
                if request.stream:
                    async for batch in batches:
                        yield batch
                else:
                    yield [item async for batch in batches for item in batch]
        except RequestRefused as refusal:
            yield [refusal.refused]
        finally:
            self._give_back(loaded)

    def close(self) -> None:
        """Stop loading and answering; requests in flight fail. Returns without waiting."""
        with self._changed:
            self._closing = True
            if self._current is not None:
                self._current.engine.close()
                self._current = None
            self._changed.notify_all()

    def _take(self, model: str) -> _Loaded:
        with self._changed:
            if self._current is None:
                if self._target is None:
                    raise not_ready(f"No version of the model `{model}` has been released yet")
                if self._failure is not None:
                    raise not_ready(
                        f"Version {self._target.number} of the model `{model}` could not be loaded"
                    )
                raise not_ready(f"Version {self._target.number} of the model `{model}` is being loaded")
            self._current.in_flight += 1
            return self._current

    def _give_back(self, loaded: _Loaded) -> None:
        with self._changed:
            loaded.in_flight -= 1
            if loaded.retired and loaded.in_flight == 0:
                loaded.engine.close()

    def _swap(self, new: _Loaded | None) -> None:
        old, self._current = self._current, new
        if old is not None:
            old.retired = True
            if old.in_flight == 0:
                old.engine.close()

    def _settled(self) -> bool:
        current = None if self._current is None else self._current.target
        return current == self._target or self._failure is not None

    def _load_until_closed(self) -> None:
        while (target := self._next_target()) is not None:
            try:
                engine = self._load(self._open_export(target.key))
                try:
                    _warm_up(engine)
                except BaseException:
                    engine.close()
                    raise
            except Exception as error:  # the old version goes on answering, and the report says why
                logger.exception("version %s cannot be loaded by %s", target.number, self._replica)
                with self._changed:
                    if target == self._target:
                        self._failure = (target, f"{type(error).__name__}: {error}")
                    self._changed.notify_all()
                continue
            with self._changed:
                if self._closing or target != self._target:
                    engine.close()
                else:
                    self._failure = None
                    self._swap(_Loaded(target, engine))
                    self._changed.notify_all()
            del engine  # the loader must not keep a version alive that has been swapped out

    def _next_target(self) -> Target | None:
        """Wait for a target that is not answered with, a failed one again after a while. None once closed."""
        with self._changed:
            while not self._closing:
                if not self._settled():
                    return self._target
                failure = self._failure
                if failure is None:
                    self._changed.wait()
                elif not self._changed.wait_for(partial(self._moved_on, failure), self._retry_seconds):
                    return self._target
            return None

    def _moved_on(self, failure: tuple[Target, str]) -> bool:
        return self._closing or self._failure is not failure


async def _decode(loaded: _Loaded, request: Generation) -> AsyncGenerator[list[Answer], None]:
    """Batches of what the engine emits for a request, the first beginning with ``Started``. Raises
    RequestRefused.
    """
    loop = asyncio.get_running_loop()
    emitted: asyncio.Queue[list[EngineEvent]] = asyncio.Queue()

    def sink(events: list[EngineEvent]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            loop.call_soon_threadsafe(emitted.put_nowait, events)

    sequences, num_prompt_tokens = await asyncio.to_thread(plan_sequences, request, loaded.engine)
    try:
        cancel = loaded.engine.submit(sequences, sink)
    except QueueFull as error:
        raise overloaded(f"The model is busy: {error}") from error
    except EngineError as error:
        raise failed(str(error)) from error
    try:
        batch: list[Answer] = [Started(loaded.target.number, num_prompt_tokens)]
        unfinished = len(sequences)
        while unfinished:
            events = await emitted.get()
            while not emitted.empty():
                events = events + emitted.get_nowait()
            for event in events:
                if isinstance(event, SequenceFailed):
                    raise failed(event.message)
                unfinished -= isinstance(event, Finished)
                batch.append(event)
            yield batch
            batch = []
    finally:
        cancel()


def _warm_up(engine: Engine) -> None:
    """Generate a little, so that the first request does not pay for it. Raises EngineError, e.g. for NaN
    logits.
    """
    events: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    prompt = engine.encode("")
    num_tokens = min(WARM_UP_TOKENS, engine.context_length - len(prompt))
    sampling = Sampling(max_tokens=num_tokens, temperature=0.0)
    engine.submit([SequenceRequest(0, prompt, num_tokens, 0, sampling)], events.put)
    while True:
        for event in events.get():
            if isinstance(event, SequenceFailed):
                raise EngineError(event.message)
            if isinstance(event, Finished):
                return
