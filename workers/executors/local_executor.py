"""The executor port without Ray, for tests, studies and hosts without it: runs wait in line for one warm process or a few.

Those that train wait for those that don't: an export or an evaluation takes seconds, and somebody waits for its result.

The Ray executor hosts one of these in a detached actor for every stage that is not training.
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

# Ended runs are kept for orchestrators that have not polled them yet; what they published outlives them anyway.
_ENDED_RUNS_KEPT = 256


@dataclass
class _Progress:
    state: RunState = RunState.RUNNING
    finished: set[str] = field(default_factory=set)
    points: list[Point] = field(default_factory=list)
    error: RunError | None = None
    cancelled: bool = False


class LocalExecutor:
    """Runs chains of stages one after another on one thread of this process, or ``processes`` of them side by side,

    each in a child process on its share of the cores. It trains with one worker, whatever is asked.
    """

    def __init__(self, artifacts: Artifacts, processes: int = 1) -> None:
        self._artifacts = artifacts
        self._processes = processes
        self._children: SimpleQueue[StageProcess] = SimpleQueue()
        if processes > 1:
            for _ in range(processes):
                self._children.put(StageProcess(artifacts.url))
        self._runs: OrderedDict[str, _Progress] = OrderedDict()
        self._lock = threading.Lock()
        self._waiting: PriorityQueue[tuple[bool, int, Run, _Progress]] = PriorityQueue()
        self._order = count()
        self._turns: set[Future[None]] = set()
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
        self._waiting.put((trains, next(self._order), run, progress))
        turn = self._pool.submit(self._run_next)
        with self._lock:
            self._turns = {other for other in self._turns if not other.done()} | {turn}

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
        """Have every run stop at the next step, and wait for it: training leaves a checkpoint behind. What waits does not begin."""
        with self._lock:
            for progress in self._runs.values():
                progress.cancelled = True
            turns = tuple(self._turns)
        wait(turns)

    def close(self) -> None:
        self.stop_all()
        self._pool.shutdown()
        while not self._children.empty():
            self._children.get().close()

    def _run_next(self) -> None:
        """As many of these are submitted as there are runs: each takes what has come to the front by then."""
        _, _, run, progress = self._waiting.get()
        child = self._children.get() if self._processes > 1 else None
        try:
            error = self._run_calls(run, progress, child)
            state = RunState.FAILED if error else RunState.SUCCEEDED
        except ChildLost as lost:
            logger.error("run %s: %s", run.id, lost)
            error, state = None, RunState.LOST
        finally:
            if child is not None:
                self._children.put(child)
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
                return describe_failure(call.stage_id, Stopped("stopped before it began"))
            error = _run_here(call, context) if child is None else child.run(call, report, should_stop)
            if error is not None:
                return error
            with self._lock:
                progress.finished.add(call.stage_id)
        return None


def _run_here(call: StageCall, context: StageContext) -> RunError | None:
    try:
        run_stage(call, context)
    except Exception as exception:  # whatever a stage raises ends its attempt, and the thread goes on
        return describe_failure(call.stage_id, exception)
    return None
