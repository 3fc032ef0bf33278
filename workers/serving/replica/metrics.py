"""Prometheus metrics of a replica, labelled by model, replica and version."""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from service.core.serving import ReplicaReport
from service.core.traffic import BOUNDS, NOTHING, Histogram, Traffic
from workers.serving.replica.model_pool import LoadedModel

PREFIX = "pathswitch_inference"
LABELS = ("model", "replica", "version")

_COUNTERS: Sequence[tuple[str, str, Callable[[Traffic], float]]] = (
    ("requests", "Requests that were answered or failed", lambda traffic: traffic.requests),
    ("failures", "Requests that failed", lambda traffic: traffic.failures),
    ("refused", "Requests that were rejected because too many were waiting", lambda traffic: traffic.refused),
    ("departed", "Requests whose client disconnected before the end", lambda traffic: traffic.departed),
    ("prompt_tokens", "Prompt tokens", lambda traffic: traffic.prompt_tokens),
    ("output_tokens", "Output tokens", lambda traffic: traffic.output_tokens),
    ("scored_tokens", "Prompt tokens scored for a trial", lambda traffic: traffic.scored_tokens),
)
_HISTOGRAMS: Sequence[tuple[str, str, Callable[[Traffic], Histogram]]] = (
    ("first_token_seconds", "Time from a request to its first token", lambda traffic: traffic.first_token),
    (
        "token_seconds",
        "Mean time between the tokens of a sequence after its first",
        lambda traffic: traffic.per_token,
    ),
)


def replica_metrics(model: str, report: ReplicaReport, models: Iterable[LoadedModel]) -> list[Metric]:
    """Return the metric families of one replica at this moment."""
    counters = [CounterMetricFamily(f"{PREFIX}_{name}", text, labels=LABELS) for name, text, _ in _COUNTERS]
    histograms = [
        HistogramMetricFamily(f"{PREFIX}_{name}", text, labels=LABELS) for name, text, _ in _HISTOGRAMS
    ]
    running = GaugeMetricFamily(f"{PREFIX}_running", "Sequences being decoded", labels=LABELS)
    waiting = GaugeMetricFamily(f"{PREFIX}_waiting", "Sequences waiting in the queue", labels=LABELS)
    cached = GaugeMetricFamily(f"{PREFIX}_cached_tokens", "Tokens in the KV cache", labels=LABELS)
    cache = GaugeMetricFamily(f"{PREFIX}_cache_tokens", "Capacity of the KV cache in tokens", labels=LABELS)
    for number, loaded in _by_number(models).items():
        labels = (model, report.replica, str(number))
        traffic = sum((each.traffic for each in loaded), NOTHING)
        for counter, (_, _, count) in zip(counters, _COUNTERS, strict=True):
            counter.add_metric(labels, count(traffic))
        for family, (_, _, histogram) in zip(histograms, _HISTOGRAMS, strict=True):
            family.add_metric(labels, *_cumulative(histogram(traffic)))
        statuses = [each.engine.status() for each in loaded]
        running.add_metric(labels, sum(status.num_running for status in statuses))
        waiting.add_metric(labels, sum(status.num_waiting for status in statuses))
        cached.add_metric(labels, sum(status.cached_tokens for status in statuses))
        cache.add_metric(labels, sum(status.cache_tokens for status in statuses))
    served = GaugeMetricFamily(
        f"{PREFIX}_served_version", "Version that answers requests without a version", labels=LABELS[:2]
    )
    if report.number is not None:
        served.add_metric((model, report.replica), report.number)
    states = GaugeMetricFamily(
        f"{PREFIX}_versions", "1 for the current state of each wanted version", labels=(*LABELS, "state")
    )
    for version in report.versions:
        states.add_metric((model, report.replica, str(version.number), version.state), 1)
    return [*counters, *histograms, running, waiting, cached, cache, served, states]


def _by_number(models: Iterable[LoadedModel]) -> dict[int, list[LoadedModel]]:
    """Group by version: a reloaded version exists twice while its retired engine still answers requests."""
    groups: dict[int, list[LoadedModel]] = {}
    for model in models:
        groups.setdefault(model.version.number, []).append(model)
    return groups


def _cumulative(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Return cumulative buckets, as Prometheus wants them, and the sum."""
    buckets: list[tuple[str, float]] = []
    below = 0
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), histogram.counts, strict=True):
        below += count
        buckets.append((bound, below))
    return buckets, histogram.total
