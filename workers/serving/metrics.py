"""What Prometheus is told of serving, when it asks: per model, version and replica."""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from service.core.serving import ReplicaReport
from service.core.traffic import BOUNDS, NOTHING, Histogram, Traffic
from workers.serving.residency import Resident

PREFIX = "pathswitch_inference"
LABELS = ("model", "replica", "version")

_COUNTERS: Sequence[tuple[str, str, Callable[[Traffic], float]]] = (
    ("requests", "Requests that were answered or failed", lambda traffic: traffic.requests),
    ("failures", "Requests that failed", lambda traffic: traffic.failures),
    ("refused", "Requests that were refused as too many waited", lambda traffic: traffic.refused),
    ("departed", "Requests whose client left before the end", lambda traffic: traffic.departed),
    ("prompt_tokens", "Tokens of prompts", lambda traffic: traffic.prompt_tokens),
    ("output_tokens", "Tokens of answers", lambda traffic: traffic.output_tokens),
    ("scored_tokens", "Tokens of prompts scored for a trial", lambda traffic: traffic.scored_tokens),
)
_HISTOGRAMS: Sequence[tuple[str, str, Callable[[Traffic], Histogram]]] = (
    ("first_token_seconds", "From a request to its first token", lambda traffic: traffic.first_token),
    (
        "token_seconds",
        "Between the tokens of a sequence after its first, mean",
        lambda traffic: traffic.per_token,
    ),
)


def replica_metrics(model: str, report: ReplicaReport, residents: Iterable[Resident]) -> list[Metric]:
    """Of one replica at this moment."""
    counters = [CounterMetricFamily(f"{PREFIX}_{name}", text, labels=LABELS) for name, text, _ in _COUNTERS]
    histograms = [
        HistogramMetricFamily(f"{PREFIX}_{name}", text, labels=LABELS) for name, text, _ in _HISTOGRAMS
    ]
    running = GaugeMetricFamily(f"{PREFIX}_running", "Sequences in the batch", labels=LABELS)
    waiting = GaugeMetricFamily(f"{PREFIX}_waiting", "Sequences in the queue", labels=LABELS)
    cached = GaugeMetricFamily(f"{PREFIX}_cached_tokens", "Tokens with keys and values kept", labels=LABELS)
    cache = GaugeMetricFamily(f"{PREFIX}_cache_tokens", "Tokens that there is room for", labels=LABELS)
    for number, alike in _by_number(residents).items():
        labels = (model, report.replica, str(number))
        traffic = sum((resident.traffic for resident in alike), NOTHING)
        for counter, (_, _, count) in zip(counters, _COUNTERS, strict=True):
            counter.add_metric(labels, count(traffic))
        for family, (_, _, histogram) in zip(histograms, _HISTOGRAMS, strict=True):
            family.add_metric(labels, *_cumulated(histogram(traffic)))
        statuses = [resident.engine.status() for resident in alike]
        running.add_metric(labels, sum(status.num_running for status in statuses))
        waiting.add_metric(labels, sum(status.num_waiting for status in statuses))
        cached.add_metric(labels, sum(status.cached_tokens for status in statuses))
        cache.add_metric(labels, sum(status.cache_tokens for status in statuses))
    served = GaugeMetricFamily(
        f"{PREFIX}_served_version", "The version that answers where none is named", labels=LABELS[:2]
    )
    if report.number is not None:
        served.add_metric((model, report.replica), report.number)
    held = GaugeMetricFamily(
        f"{PREFIX}_versions", "1 for the state of a version that is to be held", labels=(*LABELS, "state")
    )
    for version in report.versions:
        held.add_metric((model, report.replica, str(version.number), version.state), 1)
    return [*counters, *histograms, running, waiting, cached, cache, served, held]


def _by_number(residents: Iterable[Resident]) -> dict[int, list[Resident]]:
    """Of one version there may be an engine that is let go of, beside the one in its place."""
    found: dict[int, list[Resident]] = {}
    for resident in residents:
        found.setdefault(resident.version.number, []).append(resident)
    return found


def metrics_response(families: Iterable[Metric]) -> Response:
    """The families of several replicas as one text: each name once."""
    registry = CollectorRegistry()
    registry.register(_Collected(families))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._by_name: dict[str, Metric] = {}
        for family in families:
            known = self._by_name.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            known.samples += family.samples

    def collect(self) -> Iterable[Metric]:
        return self._by_name.values()


def _cumulated(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Buckets as Prometheus has them, each with all that is below it, and the sum."""
    buckets: list[tuple[str, float]] = []
    below = 0
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), histogram.counts, strict=True):
        below += count
        buckets.append((bound, below))
    return buckets, histogram.total
