"""The port through which the orchestrator runs stages: submit a run, poll it, cancel it.

A run is a chain of stages that share one start-up, such as a trunk segment and the branch that leaves it. The
executor never decides whether a stage counts: a stage has finished when its artifact's manifest exists, and
the orchestrator records it only under the current epoch. Both executors (local, and over Ray) pass the same
contract tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Protocol


class RunState(StrEnum):
    """State of a run.

    LOST: the executor does not know the run, or its process is gone. It may be submitted again.
    """

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LOST = "lost"


@dataclass(frozen=True)
class StageCall:
    """One stage to run.

    ``kind`` picks the function in STAGES; the stage publishes its artifact under ``key``.
    """

    stage_id: str
    attempt: int
    kind: str
    key: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A chain of stages under one external name. ``workers`` counts data-parallel training processes."""

    id: str
    calls: tuple[StageCall, ...]
    workers: int = 1


@dataclass(frozen=True)
class StepMetrics:
    """Measurements of one optimizer step: the columns of a metric point. ``loss`` is in nats per token."""

    step: int  # global: counted from the start of the line's stream
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float

    def as_row(self) -> dict[str, int | float]:
        """The metric columns alone, by name."""
        return {name: getattr(self, name) for name in METRIC_COLUMNS}


METRIC_COLUMNS = tuple(field.name for field in fields(StepMetrics))


@dataclass(frozen=True)
class Point(StepMetrics):
    """Progress of a training stage after one optimizer step. ``stage_step`` of ``total_steps`` are done."""

    stage_id: str
    stage_step: int
    total_steps: int
    eta_seconds: float


@dataclass(frozen=True)
class RunError:
    """Why a run failed, and in which stage: ``code`` and ``retryable`` are those of the error tree."""

    stage_id: str
    code: str
    detail: str
    retryable: bool


@dataclass(frozen=True)
class RunReport:
    """The state of a run.

    ``points`` are new since the cursor passed to this poll; pass ``cursor`` to the next one.
    """

    state: RunState
    finished: frozenset[str] = frozenset()
    points: Sequence[Point] = ()
    cursor: int = 0
    error: RunError | None = None


@dataclass(frozen=True)
class Capabilities:
    """Everything about the training hardware that affects results bit for bit. Read once per model line."""

    device: str  # "cpu" | "cuda"
    bf16: bool  # bf16 autocast is supported, and was measured to be faster than fp32
    threads: int  # intra-op threads of one training process


class Executor(Protocol):
    def capabilities(self, workers: int) -> Capabilities:
        """Describe one of ``workers`` training processes.

        Raises Unavailable while the cluster is not responding.
        """
        ...

    def submit(self, run: Run) -> None:
        """Start the run, or adopt the existing run with that id. Raises Unavailable if neither is possible."""
        ...

    def poll(self, run_id: str, cursor: int) -> RunReport:
        """Observe the run. Raises Unavailable if its state is unknown: a timeout alone never means LOST."""
        ...

    def cancel(self, run_id: str) -> None:
        """Ask the run to end and return at once; ``poll`` reports its end. Ignores unknown ids."""
        ...

    def close(self) -> None:
        """Stop the runs that end with this process at their next step, and wait until they have ended.

        A stopped run fails with the code of ``Stopped``. Runs that outlive this process continue.
        """
        ...
