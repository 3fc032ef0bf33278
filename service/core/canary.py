"""The verdict on a version that is on trial as a canary or a shadow."""

from dataclasses import dataclass

from service.core.serving_specs import CanarySpec, ShadowSpec
from service.core.traffic import Histogram, Traffic

EARLY_REQUESTS = 20  # a rate over fewer requests says nothing
EARLY_FAILURES = 5
MIN_SCORED_TOKENS = 1000
# Clients always disconnect sometimes. If this many more abandon the version on trial, it is too slow.
MAX_DEPARTED_RATE = 0.25


@dataclass(frozen=True)
class TrialVerdict:
    """``reasons`` lists why the version is rejected; if it is empty, the version takes over."""

    reasons: tuple[str, ...] = ()


def judge(
    spec: CanarySpec | ShadowSpec, candidate: Traffic, served: Traffic, seconds: float
) -> TrialVerdict | None:
    """The verdict after ``seconds`` of traffic on both versions, or None if it is too early for one."""
    errors = _too_many_errors(spec, candidate, served)
    if errors and (candidate.requests >= EARLY_REQUESTS or candidate.failures >= EARLY_FAILURES):
        return TrialVerdict((errors,))
    departures = _too_many_departures(candidate, served)
    if departures and candidate.accepted >= EARLY_REQUESTS:
        return TrialVerdict((departures,))
    enough = candidate.requests >= spec.min_requests and (
        spec.max_loss_increase is None or candidate.scored_tokens >= MIN_SCORED_TOKENS
    )
    if seconds < spec.seconds or not (enough or seconds >= spec.max_seconds):
        return None
    reasons = [
        errors,
        departures,
        _too_lossy(spec, candidate, served),
        _too_slow(spec, "to the first token", candidate.first_token, served.first_token),
        _too_slow(spec, "per token", candidate.per_token, served.per_token),
    ]
    return TrialVerdict(tuple(reason for reason in reasons if reason))


def _too_many_errors(spec: CanarySpec | ShadowSpec, candidate: Traffic, served: Traffic) -> str | None:
    if candidate.error_rate <= served.error_rate + spec.max_error_rate:
        return None
    return (
        f"{candidate.failures} of {candidate.requests} requests failed, "
        f"against {served.failures} of {served.requests} for the served version"
    )


def _too_many_departures(candidate: Traffic, served: Traffic) -> str | None:
    if candidate.departed_rate <= served.departed_rate + MAX_DEPARTED_RATE:
        return None
    return (
        f"clients abandoned {candidate.departed} of {candidate.accepted} requests before a response, "
        f"compared with {served.departed} of {served.accepted} for the served version"
    )


def _too_slow(
    spec: CanarySpec | ShadowSpec, what: str, candidate: Histogram, served: Histogram
) -> str | None:
    median, served_median = candidate.median(), served.median()
    if spec.max_latency_ratio is None or median is None or served_median is None:
        return None
    if median <= spec.max_latency_ratio * served_median:
        return None
    return f"{1e3 * median:.0f} ms {what}, against {1e3 * served_median:.0f} ms for the served version"


def _too_lossy(spec: CanarySpec | ShadowSpec, candidate: Traffic, served: Traffic) -> str | None:
    if spec.max_loss_increase is None or candidate.loss is None or served.loss is None:
        return None
    if candidate.loss <= served.loss + spec.max_loss_increase:
        return None
    return (
        f"loss {candidate.loss:.4f} nats per token on shadowed prompts, "
        f"against {served.loss:.4f} for the served version"
    )
