"""A loader of real engines that can be told to wait, to fail, to be slow, to hang and to have little room."""

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
    """``fails``: every request; ``full``: it refuses them; ``hangs``: what is asked is never answered. Told so once it has
    warmed up, or by its loader.
    """

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
            raise QueueFull("it was told to be full", 7.0)
        super().check_room()

    def submit(self, sequences: Sequence[SequenceRequest], sink: Sink) -> Callable[[], None]:
        if self.hangs:
            self.hung_since = time.monotonic()
            return lambda: None
        if self.fails:
            sink([SequenceFailed(0, "it was told to fail")])
            return lambda: None
        return super().submit(sequences, sink)

    def close(self) -> None:
        self.closed = True
        super().close()


class Loader:
    """Loads engines, remembers which and whether they live, and waits at a gate when told to. An engine takes a MiB."""

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.engines: list[weakref.ref[ScriptedEngine]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []
        self.room = 100
        self.hang_at_once = False

    def needed_bytes(self, folder: Path) -> int:
        return MIB

    def free_bytes(self) -> int:
        living = [engine for reference in self.engines if (engine := reference()) and not engine.closed]
        return (self.room - len(living)) * MIB

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
        """The one that was loaded of ``export/<name>`` last."""
        position = len(self.folders) - 1 - self.folders[::-1].index(name)
        engine = self.engines[position]()
        assert engine is not None
        return engine
