"""How far a release is: from what replicas report to its next step. Decides; writes nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from pydantic import TypeAdapter

from service.core import canary
from service.core.serving import ReplicaReport, Residence, ServedTarget, ServedVersion, Trial
from service.core.serving_specs import CanarySpec, RolloutSpec, ServingSpec, ShadowSpec
from service.core.traffic import NOTHING, Traffic

GRACE_SECONDS = (
    60.0  # replicas give up loading by themselves; past this they are not there, or end again and again
)
SCORED_SHARE = 0.1  # of the requests of a canary whose loss is asked for: each costs both versions a pass over its prompt

ROLLOUT: TypeAdapter[RolloutSpec] = TypeAdapter(RolloutSpec)


@dataclass(frozen=True)
class Pending:
    """A release that is asked for. ``first``: nothing is served so far. ``tried_as``: how it is tried; None: it takes over as
    soon as every replica has it.
    """

    release_id: str
    version: ServedVersion
    first: bool
    tried_as: CanarySpec | ShadowSpec | None
    begun_at: datetime | None
    tried_at: datetime | None
    promoted_at: datetime | None


class Step(StrEnum):
    BEGIN = "begin"
    """Replicas have been told of it."""
    TRY = "try"
    """Every replica has it: what it is tried with counts from now."""
    PROMOTE = "promote"
    """Every replica is to answer with it."""
    GO_LIVE = "go_live"
    """Every replica answers with it."""
    FAIL = "fail"


@dataclass(frozen=True)
class Move:
    """``trial``: what was counted of the version and of the served one, as the release keeps it."""

    step: Step
    error: str | None = None
    trial: dict[str, object] | None = None


def target(
    model: str,
    spec: ServingSpec,
    sequence: int,
    *,
    live: ServedVersion | None,
    pending: Pending | None,
    earlier: Sequence[ServedVersion],
) -> ServedTarget:
    """What a line should answer with. ``earlier``: what was live before, the last first."""
    rolling = spec.rollout.strategy == "rolling"
    stable: ServedVersion | None
    others: Sequence[ServedVersion | None]
    # One that is tried was asked for before the model's own rollout became rolling.
    untried = rolling and pending is not None and pending.tried_as is None
    if pending is not None and (pending.first or untried or pending.promoted_at is not None):
        stable, trial, others = pending.version, None, [live, *earlier]
    elif pending is not None:
        stable, trial, others = live, _trial(pending), earlier
    else:
        stable, trial, others = live, None, earlier
    held = {stable, None if trial is None else trial.version}
    kept = tuple(dict.fromkeys(v for v in others if v is not None and v not in held))[: spec.keep]
    return ServedTarget(
        model,
        stable,
        trial,
        kept=() if rolling else kept,
        sequence=sequence,
        spec=spec,
        rolling=rolling,
        awake=pending is not None,
        proven=live is not None,
    )


def next_move(
    pending: Pending, target: ServedTarget, reports: Sequence[ReplicaReport], now: datetime
) -> Move | None:
    """The next step of a release that is asked for; None while there is nothing to do but to wait."""
    number, limits = pending.version.number, target.spec.limits
    # A replica that is not up yet holds nothing up, as long as another is.
    reports = [report for report in reports if not report.starting] or reports
    if pending.begun_at is None:
        return Move(Step.BEGIN)
    # A replica that was not told yet may speak of the version as it was wanted before: as one that it could not keep.
    versions = [report.version(number) if report.sequence >= target.sequence else None for report in reports]
    errors = [v.error for v in versions if v is not None and v.state == Residence.FAILED and v.error]
    if errors:
        return Move(Step.FAIL, errors[0])
    seconds = limits.load_seconds + GRACE_SECONDS
    if target.stable == pending.version:
        if reports and all(report.number == number for report in reports):
            return Move(Step.GO_LIVE)
        if target.rolling:
            seconds *= max(len(reports), 1)  # one after another
        # Where nothing was served before, there is nothing to go back to.
        if pending.first or not _late(pending.promoted_at or pending.begun_at, now, seconds):
            return None
        return Move(Step.FAIL, f"not every replica answers with it after {seconds:g} s")
    if pending.tried_at is None:
        if versions and all(v is not None and v.state == Residence.READY for v in versions):
            return Move(Step.PROMOTE if pending.tried_as is None else Step.TRY)
        if not _late(pending.begun_at, now, seconds):
            return None
        return Move(Step.FAIL, f"not loaded by every replica after {seconds:g} s")
    assert pending.tried_as is not None
    assert target.stable is not None
    told = [report for report in reports if report.sequence >= target.sequence]
    tried, served = _counted(told, number), _counted(told, target.stable.number)
    so_far = (now - pending.tried_at).total_seconds()
    verdict = canary.judge(pending.tried_as, tried, served, so_far)
    # Whoever does not answer just now may be who would say that it fails.
    silent = len(told) < len(reports) and so_far < pending.tried_as.max_seconds + GRACE_SECONDS
    if verdict is None or not (verdict.reasons or (told and not silent)):
        return None
    trial = {"seconds": so_far, "tried": _summary(tried), "served": _summary(served)}
    if verdict.reasons:
        return Move(Step.FAIL, "; ".join(verdict.reasons), trial)
    return Move(Step.PROMOTE, None, trial)


def _trial(pending: Pending) -> Trial:
    # Until every replica has it, nobody is answered by it: the same users are to be, wherever they ask.
    match pending.tried_as if pending.tried_at is not None else None:
        case CanarySpec(share=share, max_loss_increase=scored):
            shadowed = 0.0 if scored is None else SCORED_SHARE
            return Trial(pending.version, share, shadowed, scored is not None)
        case ShadowSpec(share=share, max_loss_increase=scored):
            return Trial(pending.version, 0.0, share, scored is not None)
        case None:
            return Trial(pending.version)


def _late(since: datetime, now: datetime, seconds: float) -> bool:
    return (now - since).total_seconds() > seconds


def _counted(reports: Sequence[ReplicaReport], number: int) -> Traffic:
    counted = NOTHING
    for report in reports:
        version = report.version(number)
        if version is not None:
            counted = counted + version.tried
    return counted


def _summary(traffic: Traffic) -> dict[str, object]:
    return {
        "requests": traffic.requests,
        "failures": traffic.failures,
        "first_token_seconds": traffic.first_token.median(),
        "token_seconds": traffic.per_token.median(),
        "loss": None if traffic.loss is None or not math.isfinite(traffic.loss) else traffic.loss,
    }
