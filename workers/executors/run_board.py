"""The run board: a detached actor that holds every training run, its progress, and whether it should stop.

It outlives orchestrators and jobs, so either can restart without losing the other. One actor serves all runs,
because starting a Python process for each would cost every update a second or two.

Ranks that 0.2 started may call a board of this release, and vice versa, so method names stay until 0.4.
"""

from collections import OrderedDict
from typing import Any

import ray

from service.core.errors import Stopped
from service.core.executor import Point, Run, RunError

BOARD_NAME = "pathswitch-run-board"
NAMESPACE = "pathswitch"
_RUNS_KEPT = 256


class RunBoard:
    """By run id: the run, its points so far, its finished stages, its error, and whether it should stop."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def put(self, run: Run) -> None:
        """Add a run. A run that the board knows keeps its progress."""
        if run.id not in self._runs:
            self._runs[run.id] = {
                "run": run,
                "finished": set(),
                "points": [],
                "error": None,
                "stop": False,
            }
            while len(self._runs) > _RUNS_KEPT:
                self._runs.popitem(last=False)

    def run(self, run_id: str) -> Run:
        run: Run = self._runs[run_id]["run"]
        return run

    def report(self, run_id: str, points: list[Point]) -> bool:
        """Add points. Returns whether the run should stop, as a run that the board has dropped should."""
        entry = self._runs.get(run_id)
        if entry is None:
            return True
        entry["points"].extend(points)
        return bool(entry["stop"])

    def finished(self, run_id: str, stage_id: str) -> None:
        if run_id in self._runs:
            self._runs[run_id]["finished"].add(stage_id)

    def failed(self, run_id: str, error: RunError) -> None:
        """Record an error. One that is not retryable replaces others: it made the other ranks fail."""
        entry = self._runs.get(run_id)
        if entry is not None and (entry["error"] is None or not error.retryable):
            entry["error"] = error

    def stop(self, run_id: str) -> None:
        if run_id in self._runs:
            self._runs[run_id]["stop"] = True

    def stop_all(self) -> list[str]:
        """Stop every run at its next step. Returns the runs that have no progress to save."""
        not_started = []
        for run_id, entry in self._runs.items():
            entry["stop"] = True
            if not (entry["points"] or entry["finished"] or entry["error"]):
                stage_id = entry["run"].calls[0].stage_id
                error = Stopped("stopped before its first step")
                entry["error"] = RunError(stage_id, error.code, error.detail, error.retryable)
                not_started.append(run_id)
        return not_started

    def look(self, run_id: str, cursor: int) -> dict[str, Any] | None:
        """Return a run's progress with the points after ``cursor``, or None for an unknown run."""
        entry = self._runs.get(run_id)
        if entry is None:
            return None
        return {
            "finished": frozenset(entry["finished"]),
            "points": entry["points"][cursor:],
            "cursor": len(entry["points"]),
            "error": entry["error"],
        }


def board() -> Any:
    """Return a handle to the cluster's board, starting the board if there is none."""
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1)(RunBoard)
    return actor.options(
        name=BOARD_NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote()
