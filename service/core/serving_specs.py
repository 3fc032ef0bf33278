"""How a model line is served: rollouts of new versions, their limits, and the number of replicas."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from service.core.spec import Spec

Seconds = Annotated[float, Field(ge=0, le=86400 * 30, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class ReplaceSpec(Spec):
    """Every replica loads the new version alongside the old one; once all have loaded it, they switch to it."""

    strategy: Literal["replace"] = "replace"


class RollingSpec(Spec):
    """Replicas are replaced one by one, each started before an old one stops. No replica holds two versions."""

    strategy: Literal["rolling"] = "rolling"


class _TrialSpec(Spec):
    """Compare the new version with the old one for at least ``seconds`` and ``min_requests``.

    The trial ends after ``max_seconds`` at the latest.

    It takes over unless its error rate exceeds the old one's by more than ``max_error_rate``, its median
    latency (to the first token, or between tokens) exceeds ``max_latency_ratio`` times the old one's, or its
    loss on prompts that both score exceeds the old one's by more than ``max_loss_increase`` nats per token,
    if that is set.
    """

    seconds: Seconds = 300
    max_seconds: Seconds = 3600
    min_requests: int = Field(100, ge=1, le=1_000_000)
    max_error_rate: float = Field(0.01, ge=0, le=1, allow_inf_nan=False)
    max_latency_ratio: float | None = Field(2.0, gt=0, allow_inf_nan=False)
    max_loss_increase: float | None = Field(None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.max_seconds < self.seconds:
            raise ValueError("max_seconds must be at least seconds")
        return self


class CanarySpec(_TrialSpec):
    """The new version answers a share of the requests, always from the same users."""

    strategy: Literal["canary"] = "canary"
    share: Share = 0.1


class ShadowSpec(_TrialSpec):
    """The new version gets copies of a share of the requests; its answers are discarded."""

    strategy: Literal["shadow"] = "shadow"
    share: Share = 1.0


RolloutSpec = Annotated[ReplaceSpec | RollingSpec | CanarySpec | ShadowSpec, Field(discriminator="strategy")]


class LimitsSpec(Spec):
    """Limits of a version: the first three are checked after loading, before it gets any traffic.

    An engine that spends ``hang_seconds`` on one step counts as hung, however long its earlier steps took.
    """

    load_seconds: float = Field(600, gt=0, le=86400, allow_inf_nan=False)
    first_token_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    token_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    hang_seconds: float = Field(25, gt=0, le=86400, allow_inf_nan=False)


class ReplicasSpec(Spec):
    """Between ``min`` and ``max`` replicas, one per ``requests`` in flight.

    With a ``min`` of 0, none after ``idle_seconds`` without a request.
    """

    min: int = Field(1, ge=0, le=1024)
    max: int = Field(1, ge=1, le=1024)
    requests: float = Field(16, gt=0, le=1024, allow_inf_nan=False)
    idle_seconds: Seconds = 300

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError("max must be at least min")
        return self


class ServingSpec(Spec):
    """``keep``: how many earlier versions stay loaded for requests by number and for instant rollbacks."""

    rollout: RolloutSpec = ReplaceSpec()
    limits: LimitsSpec = LimitsSpec()
    replicas: ReplicasSpec = ReplicasSpec()
    keep: int = Field(1, ge=0, le=16)


DEFAULT_SERVING = ServingSpec()
