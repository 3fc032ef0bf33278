"""Models, model versions, checkpoints and forgetting."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from api.schemas.common import ResponseModel, Time
from service.core.specs import ModelSpec
from service.core.states import CheckpointState, ModelVersionState


class ModelState(ResponseModel):
    """Current state of a model. ``update`` is the id of the running update."""

    trunk_step: int
    latest_version: int | None
    served_version: int | None
    update: str | None


class Model(ModelSpec):
    """A model: its spec with every default filled in, and its current state."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    state: ModelState
    created_at: Time


class ModelChanges(ResponseModel):
    """The fields of a model that can change later; objects name only the fields that change. Others: 409."""

    model_config = ConfigDict(frozen=True, extra="allow")

    gate: dict[str, Any] = Field(default_factory=dict)
    serving: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    auto_update: bool = True
    auto_release: bool = True


class BranchPoint(ResponseModel):
    """Where the version's branch left the trunk.

    ``checkpoint`` is None if no checkpoint is recorded there.
    """

    checkpoint: str | None
    step: int


class Evaluation(ResponseModel):
    """Measurements on one slice. ``loss`` is in nats per token, or None if it was not finite."""

    slice: str
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    tokens: int


class GateResult(ResponseModel):
    """Whether the version passed the gate, and why."""

    passed: bool
    reasons: list[str]


class Cost(ResponseModel):
    """Cost of training a version. ``reused_tokens`` is the part of ``tokens`` that had been trained before."""

    tokens: int
    flops: float
    device_seconds: float
    reused_tokens: int


class ArtifactFile(ResponseModel):
    path: str
    sha256: str
    bytes: int


class Artifact(ResponseModel):
    """The exported folder: its location in the artifact store and its files."""

    path: str
    sha256: str
    files: list[ArtifactFile]


class ModelVersion(ResponseModel):
    id: str
    model: str
    number: int
    data_version: int
    state: ModelVersionState
    update: str
    branch_point: BranchPoint
    final_step: int
    parameters: int
    evaluations: list[Evaluation]
    gate: GateResult | None
    cost: Cost
    artifact: Artifact
    created_at: Time


class Checkpoint(ResponseModel):
    """A checkpoint of the trunk that updates can branch from."""

    id: str
    kind: Literal["trunk", "branch"]
    state: CheckpointState
    step: int
    data_version: int
    sha256: str
    bytes: int
    created_at: Time


class Forgetting(ResponseModel):
    """Measurements by version (row) and slice (column). None means never measured, or not finite.

    Backward transfer is the mean change of the loss, in nats per token, on the slices of older data versions
    since each was new. Negative means that the line improved on them; None, that there is no older slice.
    ``backward_transfers`` has one value per version, ``backward_transfer`` the newest version's.
    """

    slices: list[str]
    versions: list[int]
    loss: list[list[float | None]]
    perplexity: list[list[float | None]]
    bits_per_byte: list[list[float | None]]
    backward_transfer: float | None
    backward_transfers: list[float | None]
