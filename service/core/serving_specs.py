"""How a model line is served: how a new version takes over, what it is held to, and on how many replicas."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from service.core.spec import Spec

Seconds = Annotated[float, Field(ge=0, le=86400 * 30, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class ReplaceSpec(Spec):
    """Every replica loads the new version beside the old one; when all have it, all answer with it."""

    strategy: Literal["replace"] = "replace"


class RollingSpec(Spec):
    """Replica by replica, each begun before an old one ends: no replica holds two versions."""

    strategy: Literal["rolling"] = "rolling"


class _TriedSpec(Spec):
    """A new version is loaded beside the old one and tried for ``seconds`` and ``min_requests``, at most ``max_seconds``.

    It takes over unless it fails more often than the old one by ``max_error_rate``, is slower than
    ``max_latency_ratio`` times the old one (medians: to the first token, and between tokens), or, where
    ``max_loss_increase`` is given, its loss in nats per token on prompts that both score is higher by more.
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


class CanarySpec(_TriedSpec):
    """It answers a share of the requests: the same users' again and again."""

    strategy: Literal["canary"] = "canary"
    share: Share = 0.1


class ShadowSpec(_TriedSpec):
    """It is given a copy of a share of the requests; its answers go nowhere."""

    strategy: Literal["shadow"] = "shadow"
    share: Share = 1.0


RolloutSpec = Annotated[ReplaceSpec | RollingSpec | CanarySpec | ShadowSpec, Field(discriminator="strategy")]


class LimitsSpec(Spec):
    """What a version must keep to before it takes any traffic: ``first_token_seconds`` and ``token_seconds`` are measured alone,
    right after loading. One whose engine is at one and the same turn for ``hang_seconds`` hangs, however long turns have been.
    """

    load_seconds: float = Field(600, gt=0, le=86400, allow_inf_nan=False)
    first_token_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    token_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    hang_seconds: float = Field(25, gt=0, le=86400, allow_inf_nan=False)


class ReplicasSpec(Spec):
    """As many as ``requests`` each need, from ``min`` to ``max``; with ``min`` 0 none after ``idle_seconds`` without any."""

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
    """``keep``: how many earlier versions stay loaded where there is room, to be asked by number and rolled back to at once."""

    rollout: RolloutSpec = ReplaceSpec()
    limits: LimitsSpec = LimitsSpec()
    replicas: ReplicasSpec = ReplicasSpec()
    keep: int = Field(1, ge=0, le=16)


DEFAULT_SERVING = ServingSpec()
