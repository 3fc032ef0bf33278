"""When a version that is tried beside the served one takes over, and when it is given up."""

from dataclasses import dataclass

from service.core.serving_specs import CanarySpec, ShadowSpec
from service.core.traffic import Histogram, Traffic

EARLY_REQUESTS = 20  # fewer say nothing about a rate of errors
EARLY_FAILURES = 5
MIN_SCORED_TOKENS = 1000
# Clients leave for reasons of their own. More of them by so much leave for the version's: it does not come to an answer.
MAX_DEPARTED_RATE = 0.25


@dataclass(frozen=True)
class Verdict:
    """``reasons``: why it is given up; none: it takes over."""

    reasons: tuple[str, ...] = ()


def judge(spec: CanarySpec | ShadowSpec, tried: Traffic, served: Traffic, seconds: float) -> Verdict | None:
    """What ``seconds`` of both versions' traffic say about the one that is tried. None: too little yet."""
    errors = _too_many_errors(spec, tried, served)
    if errors and (tried.requests >= EARLY_REQUESTS or tried.failures >= EARLY_FAILURES):
        return Verdict((errors,))
    departures = _too_many_departures(tried, served)
    if departures and tried.given >= EARLY_REQUESTS:
        return Verdict((departures,))
    enough = tried.requests >= spec.min_requests and (
        spec.max_loss_increase is None or tried.scored_tokens >= MIN_SCORED_TOKENS
    )
    if seconds < spec.seconds or not (enough or seconds >= spec.max_seconds):
        return None
    found = [errors, departures, _too_lossy(spec, tried, served)]
    found += [
        _too_slow(spec, "to the first token", tried.first_token, served.first_token),
        _too_slow(spec, "per token", tried.per_token, served.per_token),
    ]
    return Verdict(tuple(reason for reason in found if reason))


def _too_many_errors(spec: CanarySpec | ShadowSpec, tried: Traffic, served: Traffic) -> str | None:
    if tried.error_rate <= served.error_rate + spec.max_error_rate:
        return None
    return f"{tried.failures} of {tried.requests} requests failed, of the served version {served.failures} of {served.requests}"


def _too_many_departures(tried: Traffic, served: Traffic) -> str | None:
    if tried.departed_rate <= served.departed_rate + MAX_DEPARTED_RATE:
        return None
    return (
        f"clients left {tried.departed} of {tried.given} requests before an answer, "
        f"of the served version {served.departed} of {served.given}"
    )


def _too_slow(spec: CanarySpec | ShadowSpec, what: str, tried: Histogram, served: Histogram) -> str | None:
    own, other = tried.median(), served.median()
    if (
        spec.max_latency_ratio is None
        or own is None
        or other is None
        or own <= spec.max_latency_ratio * other
    ):
        return None
    return f"{1e3 * own:.0f} ms {what}, of the served version {1e3 * other:.0f} ms"


def _too_lossy(spec: CanarySpec | ShadowSpec, tried: Traffic, served: Traffic) -> str | None:
    if spec.max_loss_increase is None or tried.loss is None or served.loss is None:
        return None
    if tried.loss <= served.loss + spec.max_loss_increase:
        return None
    return (
        f"loss {tried.loss:.4f} nats per token on shadowed prompts, of the served version {served.loss:.4f}"
    )
