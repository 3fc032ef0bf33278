"""Releases, and the state of serving."""

from typing import Annotated, Literal

from pydantic import Field

from api.schemas.common import RequestModel, ResponseModel, Text, Time
from service.core.serving import Residence
from service.core.serving_specs import RolloutSpec, ServingSpec
from service.core.states import ReleaseState


class NewRelease(RequestModel):
    """Requests that a version be served. ``previous`` is the version served before the current one.

    The default ``rollout`` is the model's own, or none for a version that was served before.
    """

    version: Annotated[int, Field(ge=1, lt=1 << 31)] | Literal["previous"]
    reason: Text | None = None
    rollout: RolloutSpec | None = None


class TrialCounts(ResponseModel):
    """One version's traffic during a trial. Seconds are medians; ``loss`` is in nats per prompt token."""

    requests: int
    failures: int
    first_token_seconds: float | None
    token_seconds: float | None
    loss: float | None


class TrialTraffic(ResponseModel):
    """The traffic of the version on trial and of the served one, by which the trial was judged."""

    seconds: float
    tried: TrialCounts
    served: TrialCounts


class Release(ResponseModel):
    """One entry of the release history. ``error`` says why loading or the trial failed."""

    id: str
    model: str
    version: int
    state: ReleaseState
    by: str
    reason: str | None
    error: str | None
    rollout: RolloutSpec | None
    trial: TrialTraffic | None
    requested_at: Time
    begun_at: Time | None
    tried_at: Time | None
    promoted_at: Time | None
    released_at: Time | None
    retired_at: Time | None


class ReplicaVersion(ResponseModel):
    """A version on a replica: loaded, loading or failed. Counts are since it was loaded."""

    version: int
    state: Residence
    error: str | None
    requests: int
    failures: int
    prompt_tokens: int
    output_tokens: int


class ReplicaStatus(ResponseModel):
    """A replica. ``version`` answers requests that name no version; it is None if the replica is not responding."""

    replica: str
    version: int | None
    versions: list[ReplicaVersion]


class ServingStatus(ResponseModel):
    """The version of a model that should be served, and what its replicas last reported.

    ``pending`` is a version that is being rolled out. ``in_step`` is True if every replica answers with
    ``version``; it is False as long as no replica has reported.
    """

    model: str
    spec: ServingSpec
    version: int | None
    pending: int | None
    in_step: bool
    observed_at: Time | None
    replicas: list[ReplicaStatus]
