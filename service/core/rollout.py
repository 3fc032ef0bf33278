"""How a release proceeds: what a line should serve, and the next action on a pending release.

Pure: it decides, and writes nothing.

A release begins, is loaded by every replica, is put on trial if it is a canary or a shadow, is promoted, and
goes live when every replica answers with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from pydantic import TypeAdapter

from service.core import canary
from service.core.json_floats import finite_or_none
from service.core.serving import ReplicaReport, Residence, ServedTarget, ServedVersion, Trial
from service.core.serving_specs import CanarySpec, RolloutSpec, ServingSpec, ShadowSpec
from service.core.traffic import NOTHING, Traffic

# Replicas themselves report loads that take too long. One that stays silent for longer than this is gone or
# keeps restarting.
GRACE_SECONDS = 60.0
# Share of a canary's requests that are scored. Scoring costs both versions a pass over the prompt.
SCORED_SHARE = 0.1

ROLLOUT: TypeAdapter[RolloutSpec] = TypeAdapter(RolloutSpec)


@dataclass(frozen=True)
class PendingRelease:
    """A release that was requested and is not live yet. ``is_first`` means that the line serves nothing yet.

    ``trial_spec`` describes the trial; None if the version takes over once every replica has loaded it.
    """

    release_id: str
    version: ServedVersion
    is_first: bool
    trial_spec: CanarySpec | ShadowSpec | None
    begun_at: datetime | None
    tried_at: datetime | None
    promoted_at: datetime | None


class Action(StrEnum):
    BEGIN = "begin"
    """Record that replicas have been told to load the version."""
    TRY = "try"
    """Every replica has loaded it: start its trial."""
    PROMOTE = "promote"
    """Have every replica answer with it."""
    GO_LIVE = "go_live"
    """Every replica answers with it: record that it is live."""
    FAIL = "fail"
    """Abandon it. Replicas keep serving what they served before."""


@dataclass(frozen=True)
class Decision:
    """The next action. After the verdict on a trial, ``trial`` has the figures that the release stores."""

    action: Action
    error: str | None = None
    trial: dict[str, object] | None = None


def served_target(
    model: str,
    spec: ServingSpec,
    sequence: int,
    *,
    live: ServedVersion | None,
    pending: PendingRelease | None,
    earlier: Sequence[ServedVersion],
) -> ServedTarget:
    """What a line should serve. ``earlier`` are the versions that were live before, newest first."""
    rolling = spec.rollout.strategy == "rolling"
    stable: ServedVersion | None
    others: Sequence[ServedVersion | None]
    # A release with a trial was requested before the model's rollout became rolling: it keeps its trial.
    rolls_out = rolling and pending is not None and pending.trial_spec is None
    if pending is not None and (pending.is_first or rolls_out or pending.promoted_at is not None):
        stable, trial, others = pending.version, None, [live, *earlier]
    elif pending is not None:
        stable, trial, others = live, _trial(pending), earlier
    else:
        stable, trial, others = live, None, earlier
    in_use = {stable, None if trial is None else trial.version}
    kept = tuple(dict.fromkeys(v for v in others if v is not None and v not in in_use))[: spec.keep]
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


def next_action(
    pending: PendingRelease, target: ServedTarget, reports: Sequence[ReplicaReport], now: datetime
) -> Decision | None:
    """The next action on a pending release, or None if there is nothing to do yet."""
    # A starting replica does not hold up the release as long as another one is up.
    reports = [report for report in reports if not report.starting] or reports
    if pending.begun_at is None:
        return Decision(Action.BEGIN)
    number = pending.version.number
    # A replica that has not received this target yet may report that it dropped the version for an earlier
    # target.
    versions = [report.version(number) if report.sequence >= target.sequence else None for report in reports]
    errors = [v.error for v in versions if v is not None and v.state == Residence.FAILED and v.error]
    if errors:
        return Decision(Action.FAIL, errors[0])
    seconds = target.spec.limits.load_seconds + GRACE_SECONDS
    if target.stable == pending.version:
        if reports and all(report.number == number for report in reports):
            return Decision(Action.GO_LIVE)
        if target.rolling:
            seconds *= max(len(reports), 1)  # replicas are replaced one after another
        # A first version is never abandoned, because there is nothing to fall back to.
        if pending.is_first or not _is_late(pending.promoted_at or pending.begun_at, now, seconds):
            return None
        return Decision(Action.FAIL, f"some replicas still do not serve the version after {seconds:g} s")
    if pending.tried_at is None:
        if versions and all(v is not None and v.state == Residence.READY for v in versions):
            return Decision(Action.PROMOTE if pending.trial_spec is None else Action.TRY)
        if not _is_late(pending.begun_at, now, seconds):
            return None
        return Decision(Action.FAIL, f"not loaded by every replica after {seconds:g} s")
    return _judge_trial(pending, target, reports, (now - pending.tried_at).total_seconds())


def _judge_trial(
    pending: PendingRelease, target: ServedTarget, reports: Sequence[ReplicaReport], elapsed: float
) -> Decision | None:
    assert pending.trial_spec is not None
    assert target.stable is not None
    current = [report for report in reports if report.sequence >= target.sequence]
    candidate = _trial_traffic(current, pending.version.number)
    served = _trial_traffic(current, target.stable.number)
    verdict = canary.judge(pending.trial_spec, candidate, served, elapsed)
    # A replica that is not responding may be the one that would report failures, so wait for it for a while.
    is_waiting = len(current) < len(reports) and elapsed < pending.trial_spec.max_seconds + GRACE_SECONDS
    if verdict is None or not (verdict.reasons or (current and not is_waiting)):
        return None
    figures: dict[str, object] = {
        "seconds": elapsed,
        "tried": _figures(candidate),
        "served": _figures(served),
    }
    if verdict.reasons:
        return Decision(Action.FAIL, "; ".join(verdict.reasons), figures)
    return Decision(Action.PROMOTE, None, figures)


def _trial(pending: PendingRelease) -> Trial:
    # Until every replica has loaded the version, it gets no requests: a user must get the same version from
    # each replica.
    match pending.trial_spec if pending.tried_at is not None else None:
        case CanarySpec(share=share, max_loss_increase=max_loss_increase):
            shadowed = 0.0 if max_loss_increase is None else SCORED_SHARE
            return Trial(pending.version, share, shadowed, max_loss_increase is not None)
        case ShadowSpec(share=share, max_loss_increase=max_loss_increase):
            return Trial(pending.version, 0.0, share, max_loss_increase is not None)
        case None:
            return Trial(pending.version)


def _is_late(since: datetime, now: datetime, seconds: float) -> bool:
    return (now - since).total_seconds() > seconds


def _trial_traffic(reports: Sequence[ReplicaReport], number: int) -> Traffic:
    """Traffic of a version over all replicas since the trial started."""
    total = NOTHING
    for report in reports:
        version = report.version(number)
        if version is not None:
            total = total + version.tried
    return total


def _figures(traffic: Traffic) -> dict[str, object]:
    return {
        "requests": traffic.requests,
        "failures": traffic.failures,
        "first_token_seconds": traffic.first_token.median(),
        "token_seconds": traffic.per_token.median(),
        "loss": finite_or_none(traffic.loss),
    }
