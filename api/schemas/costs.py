"""The cost of a model line, compared with other ways of keeping a model up to date."""

from api.schemas.common import ResponseModel


class Amount(ResponseModel):
    """Training work. ``device_seconds`` is the number of devices times the wall-clock time of training."""

    tokens: int
    flops: float
    device_seconds: float


class Estimate(ResponseModel):
    """Estimated cost of another way of training: tokens in closed form, times the line's FLOPs per token."""

    tokens: int
    flops: float


class VersionCost(ResponseModel):
    """Cost of one version's training, and of training the same version from scratch (E_i)."""

    number: int
    data_version: int
    tokens: int
    flops: float
    device_seconds: float
    reused_tokens: int
    from_scratch_tokens: int


class Totals(ResponseModel):
    """Costs by how they came about. ``spent`` plus ``reused`` are the line's tokens.

    ``spent`` was trained for this line, ``reused`` had been trained before. ``wasted`` are failed attempts
    and training that no version uses. ``extra`` are one-off updates.
    """

    spent: Amount
    reused: Amount
    wasted: Amount
    extra: Amount


class Forecast(ResponseModel):
    """Estimated cost of a next version of ``new_tokens`` tokens, and the line's ratio after it."""

    new_tokens: int
    tokens: int
    flops: float
    device_seconds: float
    from_scratch_tokens: int
    ratio_to_from_scratch: float


class Costs(ResponseModel):
    """Costs of a model line. ``ratio_to_from_scratch`` and ``forecast`` are None until it has a version."""

    ratio_to_from_scratch: float | None
    versions: list[VersionCost]
    totals: Totals
    from_scratch: Estimate
    continual: Estimate
    forecast: Forecast | None
