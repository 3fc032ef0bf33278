"""Scripted executor and serving: every stage takes no time and publishes a plausible artifact, or fails on request.

They are for tests of the orchestrator itself. Tests of the stages use the real executors.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.artifacts import Artifacts
from service.core.artifact_files import METRICS
from service.core.errors import Unavailable
from service.core.executor import Capabilities, Point, Run, RunError, RunReport, RunState, StageCall
from service.core.serving import ReplicaReport, Residence, ServedTarget, VersionReport
from service.core.stage_specs import StageKind
from service.core.traffic import NOTHING, Traffic

LOSSES_FALL_BY = 0.1


@dataclass
class ScriptedExecutor:
    """Keeps its runs outside the orchestrator, as a cluster does: hand the same executor to the next orchestrator.

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
    executed: list[str] = field(default_factory=list)  # one key for every time a stage ran
    cancelled: set[str] = field(default_factory=set)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def capabilities(self, workers: int) -> Capabilities:
        return Capabilities("cpu", bf16=False, threads=1)

    def submit(self, run: Run) -> None:
        if self.unavailable:
            raise Unavailable("the cluster does not answer")
        if run.id not in self.runs:
            self.submitted.append(run.id)
            self.runs[run.id] = {"run": run, "finished": set(), "error": None, "points": []}

    def poll(self, run_id: str, cursor: int) -> RunReport:
        if self.unavailable:
            raise Unavailable("the cluster does not answer")
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
        """Pretend that the cluster was lost and came back empty."""
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
                point = Point(call.spec["to_step"], 3.0, 0.1, 1.0, 100.0, call.stage_id, 1, 1, 0.0)
                points.append(point)
                (directory / METRICS).write_text(json.dumps(point.as_row()) + "\n")
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
    """One replica per model that switches to its latest target at once.

    Versions in ``broken`` fail to load, and those in ``loading`` never finish loading. ``traffic`` holds the trial
    traffic to report, by version number.
    """

    broken: set[int] = field(default_factory=set)
    loading: set[int] = field(default_factory=set)
    traffic: dict[int, Traffic] = field(default_factory=dict)
    answers: dict[str, int | None] = field(default_factory=dict)
    swaps: list[tuple[str, int]] = field(default_factory=list)
    targets: dict[str, ServedTarget] = field(default_factory=dict)

    def url(self) -> str:
        return "http://127.0.0.1:0"

    def apply(self, targets: Sequence[ServedTarget]) -> None:
        for target in targets:
            before = self.answers.setdefault(target.model, None)
            if target.model in self.targets and target.sequence < self.targets[target.model].sequence:
                continue
            self.targets[target.model] = target
            number = None if target.stable is None else target.stable.number
            if number is not None and number != before and number not in self.broken | self.loading:
                self.answers[target.model] = number
                self.swaps.append((target.model, number))

    def observe(self, models: Collection[str]) -> Mapping[str, Sequence[ReplicaReport]]:
        return {
            model: [
                ReplicaReport("r1", number, self._versions(self.targets[model]), self.targets[model].sequence)
            ]
            for model, number in self.answers.items()
            if model in models
        }

    def close(self) -> None:
        pass

    def _versions(self, target: ServedTarget) -> tuple[VersionReport, ...]:
        trial = None if target.trial is None else target.trial.version
        wanted = [version for version in (target.stable, trial, *target.kept) if version is not None]
        return tuple(self._version(version.number) for version in wanted)

    def _version(self, number: int) -> VersionReport:
        if number in self.broken:
            return VersionReport(number, Residence.FAILED, "broken")
        if number in self.loading:
            return VersionReport(number, Residence.LOADING)
        counted = self.traffic.get(number, NOTHING)
        return VersionReport(number, Residence.READY, None, counted, counted)
