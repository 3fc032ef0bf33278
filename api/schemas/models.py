"""Models, their versions, their trunk, and what they forgot."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from api.schemas.common import Document, Time
from service.core.specs import ModelSpec
from service.core.states import CheckpointState, ModelVersionState


class ModelState(Document):
    """Where a model stands. ``update`` is the one that is running."""

    trunk_step: int
    latest_version: int | None
    served_version: int | None
    update: str | None


class Model(ModelSpec):
    """A model as it was asked for, with every default filled in, and where it stands."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    state: ModelState
    created_at: Time


class ModelChanges(Document):
    """What may change in a model's life; an object names only the fields that change. Anything else: 409."""

    model_config = ConfigDict(frozen=True, extra="allow")

    gate: dict[str, Any] = Field(default_factory=dict)
    serving: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    auto_update: bool = True
    auto_release: bool = True


class BranchPoint(Document):
    """Where the version's branch left the trunk. ``checkpoint`` is None where it has no row of its own."""

    checkpoint: str | None
    step: int


class Evaluation(Document):
    """Loss in nats per token. None where it was not finite."""

    slice: str
    loss: float | None
    perplexity: float | None
    bits_per_byte: float | None
    tokens: int


class Verdict(Document):
    passed: bool
    reasons: list[str]


class Cost(Document):
    """What the training of a version takes. ``reused_tokens`` of its ``tokens`` had been trained already."""

    tokens: int
    flops: float
    device_seconds: float
    reused_tokens: int


class ArtifactFile(Document):
    path: str
    sha256: str
    bytes: int


class Artifact(Document):
    """The exported folder: where it lies in the artifact store, and what is in it."""

    path: str
    sha256: str
    files: list[ArtifactFile]


class ModelVersion(Document):
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
    gate: Verdict | None
    cost: Cost
    artifact: Artifact
    created_at: Time


class Checkpoint(Document):
    """A checkpoint of the trunk that updates can branch from."""

    id: str
    kind: Literal["trunk", "branch"]
    state: CheckpointState
    step: int
    data_version: int
    sha256: str
    bytes: int
    created_at: Time


class Forgetting(Document):
    """By version (row) and slice (column); None where it was never measured, or not finite.

    Backward transfer, of every version and of the newest: the mean change of the loss, in nats per token, on the slices
    of older data versions since each was new. Negative: the line got better on them. None: there is none to compare.
    """

    slices: list[str]
    versions: list[int]
    loss: list[list[float | None]]
    perplexity: list[list[float | None]]
    bits_per_byte: list[list[float | None]]
    backward_transfer: float | None
    backward_transfers: list[float | None]
