"""The world outside the orchestrators: a process that runs stages, serves versions and records every effect.

It outlives the orchestrators that a campaign kills. Stages are stubs that publish real artifacts.
"""

import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import Any

from service.artifacts import LocalArtifacts
from service.core.executor import Capabilities, Point, Run, RunReport, RunState, StageCall
from service.core.manifest import Manifest
from service.core.serving import ReplicaReport, ServedTarget
from service.core.stage_specs import StageKind
from tests.chaos.processes import FORK
from tests.support.scripted import ScriptedExecutor, ScriptedServing

FAILS_ONCE = "fails-once"  # in a dataset's name: the first attempt at each of its evaluations fails
GATED = "gated"  # in a dataset's name: the gate rejects its models


@dataclass(frozen=True)
class WorkerDeath:
    """Kill the worker of the ``number``-th stage that runs, ``before`` or ``after`` it publishes."""

    number: int
    when: str


@dataclass
class Record:
    """All effects in order. ``duplicates`` are keys that were published again."""

    submitted: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    published: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    swaps: list[tuple[str, int]] = field(default_factory=list)
    workers_killed: int = 0


class _WorkerDied(Exception):
    pass


class _RecordingArtifacts(LocalArtifacts):
    def __init__(self, root: Path, record: Record) -> None:
        super().__init__(root)
        self._record = record

    def publish(self, key: str, directory: Path, result: dict[str, Any]) -> Manifest:
        manifest = super().publish(key, directory, result)
        is_new = manifest.directory == directory.name
        (self._record.published if is_new else self._record.duplicates).append(key)
        return manifest


class World(ScriptedExecutor):
    """A scripted executor and serving. With ``stage_seconds`` 0, stages run when their run is polled, so time does not matter."""

    def __init__(self, root: str, stage_seconds: float = 0.0, death: WorkerDeath | None = None) -> None:
        self._record = Record()
        super().__init__(_RecordingArtifacts(Path(root), self._record))
        self._serving = ScriptedServing()
        self._seconds = stage_seconds
        self._death = death
        self._failed: set[str] = set()
        self._lock = threading.RLock()

    def record(self) -> Record:
        with self._lock:
            return self._record

    def hold_kinds(self, kinds: set[StageKind]) -> None:
        self.hold = kinds

    def submit(self, run: Run) -> None:
        with self._lock:
            known = run.id in self.runs
            (self._record.adopted if known else self._record.submitted).append(run.id)
            super().submit(run)
        if self._seconds and not known:
            threading.Thread(target=self._run_stages, args=(run.id,), daemon=True).start()

    def poll(self, run_id: str, cursor: int) -> RunReport:
        with self._lock:
            try:
                return super().poll(run_id, cursor)
            except _WorkerDied:
                del self.runs[run_id]
                return RunReport(RunState.LOST)

    def apply(self, targets: Sequence[ServedTarget]) -> int:
        """Apply the targets. Returns the number of models that swapped."""
        with self._lock:
            before = len(self._serving.swaps)
            self._serving.apply(targets)
            self._record.swaps = self._serving.swaps
            return len(self._serving.swaps) - before

    def observe(self, models: Collection[str]) -> Mapping[str, Sequence[ReplicaReport]]:
        with self._lock:
            return self._serving.observe(models)

    def _go_on(self, run_id: str, entry: dict[str, Any]) -> RunState:
        if not self._seconds:
            return super()._go_on(run_id, entry)
        if entry["error"] or run_id in self.cancelled:
            return RunState.FAILED
        done = len(entry["finished"]) == len(entry["run"].calls)
        return RunState.SUCCEEDED if done else RunState.RUNNING

    def _run_stages(self, run_id: str) -> None:
        entry = self.runs[run_id]
        for call in entry["run"].calls:
            time.sleep(self._seconds)
            if run_id in self.cancelled:
                return
            self._execute(call, entry["points"])
            entry["finished"].add(call.stage_id)

    def _execute(self, call: StageCall, points: list[Point]) -> None:
        if _fails_once(call) and call.key not in self._failed:
            self._failed.add(call.key)
            raise _WorkerDied
        self._record.executed.append(call.key)
        death = self._death
        if death is None or death.number != len(self._record.executed):
            super()._execute(call, points)
            return
        worker = os.fork()
        if worker == 0:
            try:
                if death.when == "after":
                    super()._execute(call, points)
                else:
                    with self.artifacts.writing(call.key) as directory:
                        (directory / "content").write_text(call.key)
                        os.kill(os.getpid(), signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        _, status = os.waitpid(worker, 0)
        assert os.WIFSIGNALED(status), status
        self._record.workers_killed += 1
        if self.artifacts.manifest(call.key) is not None:
            self._record.published.append(call.key)
        raise _WorkerDied

    def _result(self, call: StageCall) -> dict[str, Any]:
        result = super()._result(call)
        if call.kind == StageKind.EVALUATE and any(GATED in ref["key"] for ref in call.spec["slices"]):
            return result | {"evaluations": [row | {"loss": float("nan")} for row in result["evaluations"]]}
        return result


def _fails_once(call: StageCall) -> bool:
    return call.kind == StageKind.EVALUATE and any(FAILS_ONCE in ref["key"] for ref in call.spec["slices"])


class WorldManager(BaseManager):
    """The parent of world processes."""

    def world(self, root: str, stage_seconds: float = 0.0, death: WorkerDeath | None = None) -> Any:
        """Create a World and return a proxy for it, which forked processes can use too."""
        return self.create_world(root, stage_seconds, death)  # type: ignore[attr-defined]


WorldManager.register(
    "create_world",
    World,
    exposed=("submit", "poll", "cancel", "capabilities", "apply", "observe", "record", "hold_kinds"),
)


@contextmanager
def worlds() -> Iterator[WorldManager]:
    """Run a process that hosts worlds."""
    manager = WorldManager(ctx=FORK)
    manager.start(_ignore_interrupts)
    try:
        yield manager
    finally:
        manager.shutdown()


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class OutsideExecutor:
    """An executor that forwards to a world."""

    def __init__(self, world: Any) -> None:
        self._world = world

    def capabilities(self, workers: int) -> Capabilities:
        return self._world.capabilities(workers)

    def submit(self, run: Run) -> None:
        self._world.submit(run)

    def poll(self, run_id: str, cursor: int) -> RunReport:
        return self._world.poll(run_id, cursor)

    def cancel(self, run_id: str) -> None:
        self._world.cancel(run_id)

    def close(self) -> None:
        pass


class OutsideServing:
    """A serving that forwards to a world."""

    def __init__(self, world: Any) -> None:
        self._world = world

    def url(self) -> str:
        return "http://127.0.0.1:0"

    def apply(self, targets: Sequence[ServedTarget]) -> None:
        self._world.apply(targets)

    def observe(self, models: Collection[str]) -> Mapping[str, Sequence[ReplicaReport]]:
        return self._world.observe(models)

    def close(self) -> None:
        pass
