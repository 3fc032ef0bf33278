"""The orchestrator's two ports, scripted: every stage takes no time and publishes a plausible artifact, or fails as told.

For tests of the orchestrator's own mechanics. What stages really do is tested with the real executors.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.artifacts import Artifacts
from service.core.errors import Unavailable
from service.core.executor import Capabilities, Point, Run, RunError, RunReport, RunState, StageCall
from service.core.serving import ReplicaReport, ServedTarget
from service.core.stage_specs import StageKind

LOSSES_FALL_BY = 0.1


@dataclass
class ScriptedExecutor:
    """Runs live outside the orchestrator, as jobs on a cluster do: hand the same one to the next orchestrator.

    ``fail`` maps a stage kind to the errors of its next attempts; ``hold`` kinds keep running until released.
    """

    artifacts: Artifacts
    rows: int = 1600
    fail: dict[StageKind, list[RunError]] = field(default_factory=lambda: defaultdict(list))
    hold: set[StageKind] = field(default_factory=set)
    losses: Callable[[str], float] = lambda name: 3.0
    unavailable: bool = False
    carried_device_seconds: float = 0.0
    submitted: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)  # keys, once for every time a stage really ran
    cancelled: set[str] = field(default_factory=set)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def capabilities(self, workers: int) -> Capabilities:
        return Capabilities("cpu", bf16=False, threads=1)

    def submit(self, run: Run) -> None:
        if self.unavailable:
            raise Unavailable("the cluster is away")
        if run.id not in self.runs:
            self.submitted.append(run.id)
            self.runs[run.id] = {"run": run, "finished": set(), "error": None, "points": []}

    def poll(self, run_id: str, cursor: int) -> RunReport:
        if self.unavailable:
            raise Unavailable("the cluster is away")
        entry = self.runs.get(run_id)
        if entry is None:
            return RunReport(state=RunState.LOST)
        state = self._go_on(run_id, entry)
        return RunReport(
            state=state,
            finished=frozenset(entry["finished"]),
            points=tuple(entry["points"][cursor:]),
            cursor=len(entry["points"]),
            error=entry["error"],
        )

    def cancel(self, run_id: str) -> None:
        self.cancelled.add(run_id)

    def close(self) -> None:
        pass

    def lose_everything(self) -> None:
        """The cluster is gone and comes back empty."""
        self.runs.clear()

    def _go_on(self, run_id: str, entry: dict[str, Any]) -> RunState:
        for call in entry["run"].calls:
            if call.stage_id in entry["finished"]:
                continue
            if entry["error"] or run_id in self.cancelled:
                return RunState.FAILED
            if self.fail[StageKind(call.kind)]:
                error = self.fail[StageKind(call.kind)].pop(0)
                entry["error"] = RunError(call.stage_id, error.code, error.detail, error.retryable)
                return RunState.FAILED
            if StageKind(call.kind) in self.hold:
                return RunState.RUNNING
            self._execute(call, entry["points"])
            entry["finished"].add(call.stage_id)
        return RunState.SUCCEEDED

    def _execute(self, call: StageCall, points: list[Point]) -> None:
        self.executed.append(call.key)
        with self.artifacts.writing(call.key) as directory:
            if "line" in call.spec and "ledger" in call.spec:
                point = Point(call.stage_id, call.spec["to_step"], 1, 1, 3.0, 0.1, 1.0, 100.0, 0.0)
                points.append(point)
                # Without the stage's id, so that whatever stage trains it publishes the same bytes.
                kept = {name: value for name, value in vars(point).items() if name != "stage_id"}
                (directory / "metrics.jsonl").write_text(json.dumps(kept) + "\n")
            else:
                (directory / "content").write_text(call.key)
            self.artifacts.publish(call.key, directory, self._result(call))

    def _result(self, call: StageCall) -> dict[str, Any]:
        spec = call.spec
        match StageKind(call.kind):
            case StageKind.PACK:
                return {"rows": self.rows, "tokens": self.rows * 128}
            case StageKind.TRAIN_TRUNK | StageKind.TRAIN_BRANCH | StageKind.TRAIN:
                return {
                    "tokens": (spec["to_step"] - spec["from_step"]) * 2048,
                    "flops": 1e9,
                    "device_seconds": 1.0,
                    "carried_device_seconds": self.carried_device_seconds,
                }
            case StageKind.EXPORT:
                return {"parameters": 1000}
            case StageKind.EVALUATE:
                return {
                    "evaluations": [self._evaluation(ref["name"]) for ref in spec["slices"]],
                    "served_evaluations": [self._evaluation(ref["name"]) for ref in spec["served_slices"]],
                }
        return {}

    def _evaluation(self, name: str) -> dict[str, Any]:
        loss = self.losses(name)
        return {"slice": name, "loss": loss, "perplexity": 20.0, "bits_per_byte": 1.0, "tokens": 1000}


@dataclass
class ScriptedServing:
    """One replica per model that answers with what it was last told, at once; ``broken`` numbers can't be loaded."""

    broken: set[int] = field(default_factory=set)
    answers: dict[str, int | None] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    swaps: list[tuple[str, int]] = field(default_factory=list)
    sequences: dict[str, int] = field(default_factory=dict)

    def url(self) -> str:
        return "http://127.0.0.1:0"

    def apply(self, targets: Sequence[ServedTarget]) -> None:
        for target in targets:
            before = self.answers.setdefault(target.model, None)
            if target.sequence < self.sequences.get(target.model, 0):
                continue
            self.sequences[target.model] = target.sequence
            if target.number is None or target.number == before:
                continue
            if target.number in self.broken:
                self.failed[target.model] = target.number
                continue
            self.answers[target.model] = target.number
            self.swaps.append((target.model, target.number))

    def observe(self) -> Mapping[str, Sequence[ReplicaReport]]:
        return {
            model: [
                ReplicaReport(
                    "r1", number, self.failed.get(model), "broken" if model in self.failed else None
                )
            ]
            for model, number in self.answers.items()
        }

    def close(self) -> None:
        pass
