"""Updates, stages and training metrics."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from api.schemas.common import RequestModel, ResponseModel, Time
from service.core.paradigm_specs import BranchSpec, ParadigmSpec
from service.core.stage_specs import StageKind
from service.core.states import StageState, UpdateState


class NewUpdate(RequestModel):
    """Requests the line's next version, by default on the newest data version, or a one-off version.

    A one-off is a branch from a trunk checkpoint (``branch_from``) under any ``decay``, or a version under
    another ``paradigm``. The line does not continue from it.
    """

    data_version: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    branch_from: str | None = None
    decay: BranchSpec | None = None
    paradigm: ParadigmSpec | None = None

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.decay is not None and self.branch_from is None:
            raise ValueError("decay needs branch_from")
        if self.decay is not None and self.decay.length.rule == "auto":
            raise ValueError("decay.length.rule auto is not possible with branch_from: give another rule")
        if self.paradigm is not None and self.branch_from is not None:
            raise ValueError("give branch_from or paradigm, not both")
        return self


class StageProgress(ResponseModel):
    """Progress of a training stage. ``step`` counts within the stage."""

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    eta_seconds: float


class Failure(ResponseModel):
    """Why a stage or an update failed. ``stage`` is the name of the stage in which an update failed."""

    code: str
    detail: str
    stage: str | None = None
    attempt: int | None = None


class Stage(ResponseModel):
    """A stage of an update.

    ``needs`` are ids of other stages; ``error`` belongs to the last failed attempt.
    """

    id: str
    name: str
    kind: StageKind
    state: StageState
    attempt: int
    reused: bool
    needs: list[str]
    progress: StageProgress | None
    error: Failure | None
    started_at: Time | None
    finished_at: Time | None


class Update(ResponseModel):
    """An update, with ``stages`` in topological order and the planner's ``notes``.

    A ``one_off`` is not part of the line.
    """

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


class MetricPoint(ResponseModel):
    """Metrics of one optimizer step. ``step`` is the line's global step."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float


class Metrics(ResponseModel):
    data: list[MetricPoint]
