"""A loader of real engines that tests can make wait, fail, hang, or run short of memory."""

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from workers.serving.engine.batching.transformers_engine import TransformersEngine
from workers.serving.engine.port import EngineStatus, QueueFull, SequenceFailed, SequenceRequest, Sink

MIB = 1 << 20


class ScriptedEngine(TransformersEngine):
    """``fails`` fails every request, ``full`` rejects it, ``hangs`` never answers it. Set after the warm-up."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fails = self.hangs = self.full = False
        self.closed = False
        self.hung_since: float | None = None
        self.hung_seconds = 1e9

    def status(self) -> EngineStatus:
        status = super().status()
        return replace(status, stalled_seconds=self.hung_seconds) if self.hung_since else status

    def check_room(self) -> None:
        if self.full:
            raise QueueFull("scripted to be full", 7.0)
        super().check_room()

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        if self.hangs:
            self.hung_since = time.monotonic()
            return lambda: None
        if self.fails:
            sink([SequenceFailed(0, "scripted to fail")])
            return lambda: None
        return super().submit(sequences, sink)

    def close(self) -> None:
        self.closed = True
        super().close()


class ScriptedLoader:
    """Loads engines of one MiB each, records which, and waits while ``gate`` is not set.

    ``errors`` are raised by the next loads; ``capacity`` is in MiB; ``hang_at_once`` hangs engines before the
    warm-up.
    """

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.engines: list[weakref.ref[ScriptedEngine]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []
        self.capacity = 100
        self.hang_at_once = False

    def needed_bytes(self, folder: Path) -> int:
        return MIB

    def free_bytes(self) -> int:
        open_engines = [engine for reference in self.engines if (engine := reference()) and not engine.closed]
        return (self.capacity - len(open_engines)) * MIB

    def load(self, folder: Path, seconds: float) -> ScriptedEngine:
        self.folders.append(folder.parent.name)
        assert self.gate.wait(30)
        if self.errors:
            raise self.errors.pop(0)
        engine = ScriptedEngine(folder)
        engine.hangs = self.hang_at_once
        self.engines.append(weakref.ref(engine))
        return engine

    def engine(self, name: str) -> ScriptedEngine:
        """Return the engine that was last loaded from ``export/<name>``."""
        position = len(self.folders) - 1 - self.folders[::-1].index(name)
        engine = self.engines[position]()
        assert engine is not None
        return engine
