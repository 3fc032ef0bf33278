"""The executor port without Ray, for tests, studies and machines that run no Ray.

Runs wait in one queue. Training runs yield to all others, because an export or an evaluation takes seconds
and users are waiting for it. The Ray executor uses this class, too: its stage host runs every stage that
does not train.
"""

import logging
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from queue import PriorityQueue, SimpleQueue

from service.artifacts import Artifacts
from service.core.errors import Stopped
from service.core.executor import Capabilities, Point, Run, RunError, RunReport, RunState, StageCall
from service.core.stage_specs import TRAINING_KINDS
from workers.executors.capabilities import measure_capabilities
from workers.executors.failures import describe_failure
from workers.executors.stage_process import ChildLost, StageProcess
from workers.stages import run_stage
from workers.stages.context import StageContext

logger = logging.getLogger(__name__)

# Orchestrators poll ended runs for a while longer. Published artifacts outlive the entry.
_ENDED_RUNS_KEPT = 256


@dataclass
class _Progress:
    state: RunState = RunState.RUNNING
    finished: set[str] = field(default_factory=set)
    points: list[Point] = field(default_factory=list)
    error: RunError | None = None
    cancelled: bool = False


class LocalExecutor:
    """Runs chains of stages one at a time on a thread of this process, or ``processes`` of them in parallel.

    In parallel, each runs in a child process with its share of the cores. A run always trains with one
    worker.
    """

    def __init__(self, artifacts: Artifacts, processes: int = 1) -> None:
        self._artifacts = artifacts
        self._processes = processes
        self._idle_children: SimpleQueue[StageProcess] = SimpleQueue()
        if processes > 1:
            for _ in range(processes):
                self._idle_children.put(StageProcess(artifacts.url))
        self._runs: OrderedDict[str, _Progress] = OrderedDict()
        self._lock = threading.Lock()
        self._queue: PriorityQueue[tuple[bool, int, Run, _Progress]] = PriorityQueue()
        self._sequence = count()
        self._futures: set[Future[None]] = set()
        self._pool = ThreadPoolExecutor(max_workers=processes, thread_name_prefix="stages")

    def capabilities(self, workers: int) -> Capabilities:
        return measure_capabilities(self._processes)

    def submit(self, run: Run) -> None:
        with self._lock:
            if run.id in self._runs:
                return
            self._runs[run.id] = progress = _Progress()
            ended = [key for key, value in self._runs.items() if value.state != RunState.RUNNING]
            for key in ended[: max(0, len(ended) - _ENDED_RUNS_KEPT)]:
                del self._runs[key]
        trains = any(call.kind in TRAINING_KINDS for call in run.calls)
        self._queue.put((trains, next(self._sequence), run, progress))
        future = self._pool.submit(self._run_next)
        with self._lock:
            self._futures = {other for other in self._futures if not other.done()} | {future}

    def poll(self, run_id: str, cursor: int) -> RunReport:
        with self._lock:
            progress = self._runs.get(run_id)
            if progress is None:
                return RunReport(state=RunState.LOST)
            return RunReport(
                state=progress.state,
                finished=frozenset(progress.finished),
                points=tuple(progress.points[cursor:]),
                cursor=len(progress.points),
                error=progress.error,
            )

    def cancel(self, run_id: str) -> None:
        with self._lock:
            progress = self._runs.get(run_id)
            if progress is not None:
                progress.cancelled = True

    def stop_all(self) -> None:
        """Stop every run at its next step, where training leaves a checkpoint, and wait for it.

        Queued runs do not start.
        """
        with self._lock:
            for progress in self._runs.values():
                progress.cancelled = True
            futures = tuple(self._futures)
        wait(futures)

    def close(self) -> None:
        self.stop_all()
        self._pool.shutdown()
        while not self._idle_children.empty():
            self._idle_children.get().close()

    def _run_next(self) -> None:
        """Run the first run of the queue. The pool gets this task once for every submitted run."""
        _, _, run, progress = self._queue.get()
        child = self._idle_children.get() if self._processes > 1 else None
        try:
            error = self._run_calls(run, progress, child)
            state = RunState.FAILED if error else RunState.SUCCEEDED
        except ChildLost as lost:
            logger.error("run %s: %s", run.id, lost)
            error, state = None, RunState.LOST
        finally:
            if child is not None:
                self._idle_children.put(child)
        with self._lock:
            progress.error = error
            progress.state = state

    def _run_calls(self, run: Run, progress: _Progress, child: StageProcess | None) -> RunError | None:
        def report(point: Point) -> None:
            with self._lock:
                progress.points.append(point)

        def should_stop() -> bool:
            return progress.cancelled

        context = StageContext(artifacts=self._artifacts, report=report, should_stop=should_stop)
        for call in run.calls:
            if should_stop():
                return describe_failure(call.stage_id, Stopped("stopped before it started"))
            error = _run_in_process(call, context) if child is None else child.run(call, report, should_stop)
            if error is not None:
                return error
            with self._lock:
                progress.finished.add(call.stage_id)
        return None


def _run_in_process(call: StageCall, context: StageContext) -> RunError | None:
    try:
        run_stage(call, context)
    except Exception as exception:  # any exception ends the attempt, and the thread takes the next run
        return describe_failure(call.stage_id, exception)
    return None
