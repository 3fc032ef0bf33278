"""Updates, their stages and the metrics of those that train."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from api.schemas.common import Document, Request, Time
from service.core.paradigm_specs import BranchSpec, ParadigmSpec
from service.core.stage_specs import StageKind
from service.core.states import StageState, UpdateState


class NewUpdate(Request):
    """The line's next version, to the newest data version unless one is given. Or one that the line does not go on from:

    a branch from a trunk checkpoint (``branch_from``) under any ``decay``, or a version under another ``paradigm``.
    """

    data_version: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    branch_from: str | None = None
    decay: BranchSpec | None = None
    paradigm: ParadigmSpec | None = None

    @model_validator(mode="after")
    def _one_thing_at_a_time(self) -> Self:
        if self.decay is not None and self.branch_from is None:
            raise ValueError("decay belongs to branch_from")
        if self.decay is not None and self.decay.length.rule == "auto":
            raise ValueError("a branch from a checkpoint takes a length of its own, not the rule auto")
        if self.paradigm is not None and self.branch_from is not None:
            raise ValueError("branch_from makes a branch: it takes a decay and no paradigm")
        return self


class Progress(Document):
    """``step`` counts within the stage."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    eta_seconds: float


class Failure(Document):
    """Why a stage or an update failed; ``stage`` is the name of the stage an update failed in."""

    code: str
    detail: str
    stage: str | None = None
    attempt: int | None = None


class Stage(Document):
    """``needs`` are ids of stages of the same update; ``error`` is of the last attempt that failed."""

    id: str
    name: str
    kind: StageKind
    state: StageState
    attempt: int
    reused: bool
    needs: list[str]
    progress: Progress | None
    error: Failure | None
    started_at: Time | None
    finished_at: Time | None


class Update(Document):
    """``stages`` in topological order; ``notes`` say how the plan came out. A ``one_off`` is no part of the line."""

    id: str
    model: str
    data_version: int
    paradigm: ParadigmSpec
    one_off: bool
    branch_from: str | None
    state: UpdateState
    model_version: int | None
    branch_point: int | None
    final_step: int | None
    notes: dict[str, Any]
    error: Failure | None
    stages: list[Stage]
    created_at: Time
    started_at: Time | None
    finished_at: Time | None


class MetricPoint(Document):
    """One optimizer step; ``step`` is the line's global step."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float


class Metrics(Document):
    data: list[MetricPoint]
