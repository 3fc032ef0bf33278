"""The response of ``/metrics``: the families of all replicas as one Prometheus text."""

from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, generate_latest
from prometheus_client.registry import Collector
from starlette.responses import Response


def metrics_response(families: Iterable[Metric]) -> Response:
    """Merge families of the same name, so that each has one heading."""
    registry = CollectorRegistry()
    registry.register(_MergedFamilies(families))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _MergedFamilies(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._by_name: dict[str, Metric] = {}
        for family in families:
            merged = self._by_name.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            merged.samples += family.samples

    def collect(self) -> Iterable[Metric]:
        return self._by_name.values()
