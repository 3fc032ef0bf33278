"""What a model line has cost, beside what other ways would have."""

from api.schemas.common import Document


class Amount(Document):
    """``device_seconds``: devices × wall-clock of training."""

    tokens: int
    flops: float
    device_seconds: float


class Estimate(Document):
    """What some way of training would take: tokens by its closed form, FLOPs at the line's rate per token."""

    tokens: int
    flops: float


class VersionCost(Document):
    """One version's own training, and what training it from scratch would have taken (E_i)."""

    number: int
    data_version: int
    tokens: int
    flops: float
    device_seconds: float
    reused_tokens: int
    from_scratch_tokens: int


class Totals(Document):
    """``spent`` was trained anew, ``reused`` had been trained already; together they are the line's tokens.

    ``wasted`` are failed attempts and training that no version stands on; ``extra`` are one-off branches.
    """

    spent: Amount
    reused: Amount
    wasted: Amount
    extra: Amount


class Forecast(Document):
    """What a next version of ``new_tokens`` would take, and the ratio of the whole line after it."""

    new_tokens: int
    tokens: int
    flops: float
    device_seconds: float
    from_scratch_tokens: int
    ratio_to_from_scratch: float


class Costs(Document):
    """``ratio_to_from_scratch`` and ``forecast`` are None until the line has a version."""

    ratio_to_from_scratch: float | None
    versions: list[VersionCost]
    totals: Totals
    from_scratch: Estimate
    continual: Estimate
    forecast: Forecast | None
