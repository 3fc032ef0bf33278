"""The run board: one small detached actor that knows what every training run is, how far it is, and whether to stop.

It outlives orchestrators and jobs alike, so either may be restarted without losing sight of the other. One actor for all
runs rather than one each: starting a Python process takes a second or two that every update would pay.
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
    """Runs by id: what to do, points so far, which stages have ended, the error, and whether a stop is wanted."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def put(self, run: Run) -> None:
        """Pin up a run; one that is known keeps what has been reported of it."""
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
        """Take points; answers whether the run should stop. A run that is not known any more should."""
        entry = self._runs.get(run_id)
        if entry is None:
            return True
        entry["points"].extend(points)
        return bool(entry["stop"])

    def finished(self, run_id: str, stage_id: str) -> None:
        if run_id in self._runs:
            self._runs[run_id]["finished"].add(stage_id)

    def failed(self, run_id: str, error: RunError) -> None:
        """Take an error. Of several ranks' errors the final one counts: the others are its echoes."""
        entry = self._runs.get(run_id)
        if entry is not None and (entry["error"] is None or not error.retryable):
            entry["error"] = error

    def stop(self, run_id: str) -> None:
        if run_id in self._runs:
            self._runs[run_id]["stop"] = True

    def stop_all(self) -> list[str]:
        """Have every run stop at its next step. Returns those that have trained none yet, which need not be waited for."""
        unbegun = []
        for run_id, entry in self._runs.items():
            entry["stop"] = True
            if not (entry["points"] or entry["finished"] or entry["error"]):
                stage_id = entry["run"].calls[0].stage_id
                error = Stopped("stopped before its first step")
                entry["error"] = RunError(stage_id, error.code, error.detail, error.retryable)
                unbegun.append(run_id)
        return unbegun

    def look(self, run_id: str, cursor: int) -> dict[str, Any] | None:
        """What is known of a run, with the points after ``cursor``; None where nothing is."""
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
    """A handle of the board, which is started where it does not exist."""
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1)(RunBoard)
    return actor.options(
        name=BOARD_NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True
    ).remote()
