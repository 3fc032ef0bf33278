"""The port through which the orchestrator has stages run: submit a chain, poll it, cancel it.

A run is a chain of one or two stages (a trunk segment and the branch that leaves it share one start-up). The executor
never decides whether a stage *counts*: a stage is finished when its artifact's manifest exists, and the orchestrator
records it only under the current epoch. Both executors (in process, Ray) pass the same contract tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class RunState(StrEnum):
    """Where a run stands. ``LOST`` covers "never heard of it" and "its process is gone": the orchestrator may resubmit."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LOST = "lost"


@dataclass(frozen=True)
class StageCall:
    """One stage to run: ``kind`` picks the function from ``STAGES``, ``spec`` is its JSON, ``key`` the artifact it publishes."""

    stage_id: str
    attempt: int
    kind: str
    key: str
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A chain of stages under one external name. ``workers`` is the number of data-parallel training processes."""

    id: str
    calls: tuple[StageCall, ...]
    workers: int = 1


@dataclass(frozen=True)
class Point:
    """Progress of one optimizer step. ``step`` is the line's global step; ``stage_step`` counts within the stage."""

    stage_id: str
    step: int
    stage_step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    eta_seconds: float


@dataclass(frozen=True)
class RunError:
    """Why a run failed: the code and retryability of the error tree, and which stage it was."""

    stage_id: str
    code: str
    detail: str
    retryable: bool


@dataclass(frozen=True)
class RunReport:
    """What ``poll`` returns. ``cursor`` is handed back at the next poll; ``points`` are those after the cursor given."""

    state: RunState
    finished: frozenset[str] = frozenset()
    points: Sequence[Point] = ()
    cursor: int = 0
    error: RunError | None = None


@dataclass(frozen=True)
class Capabilities:
    """What the training hardware is: everything about it that changes bits. Resolved once for a model line."""

    device: str  # "cpu" | "cuda"
    bf16: bool  # bf16 autocast is supported and measured faster than fp32
    threads: int  # intra-op threads of one training worker


class Executor(Protocol):
    def capabilities(self, workers: int) -> Capabilities:
        """Describe one of ``workers`` training processes. Raises Unavailable while the cluster does not answer."""
        ...

    def submit(self, run: Run) -> None:
        """Start the run, or adopt it where a run of that id exists. Raises Unavailable when neither could be done."""
        ...

    def poll(self, run_id: str, cursor: int) -> RunReport:
        """Observe the run. Raises Unavailable when the answer is not known (never LOST for a mere time-out)."""
        ...

    def cancel(self, run_id: str) -> None:
        """Ask the run to end. Returns at once; poll tells when it is gone. Unknown ids are fine."""
        ...

    def close(self) -> None:
        """Let go of runs that outlive this process. Have the others stop at the next step, and wait until polls say so.

        A run that is stopped fails with the code of ``Stopped``.
        """
        ...
