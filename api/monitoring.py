"""Prometheus metrics: requests as they are answered, and the state of the queue at each scrape."""

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.schemas.common import BASE
from service.store import metrics
from service.store.database import Database

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class RequestMetrics:
    """Middleware that counts and times requests by route template, so that names in URLs create no series."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._requests = Counter(
            "pathswitch_http_requests",
            "Requests answered",
            ("method", "route", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "pathswitch_http_request_seconds",
            "Time until the end of the response",
            ("method", "route"),
            buckets=_BUCKETS,
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, record_status)
        finally:
            # Some versions of FastAPI include the prefix in the path, others do not.
            route = getattr(scope.get("route"), "path", "unknown").removeprefix(BASE)
            self._requests.labels(scope["method"], route, status).inc()
            self._seconds.labels(scope["method"], route).observe(time.perf_counter() - began)


class QueueCollector(Collector):
    """Collects updates, releases and stages from the database at each scrape."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering the collector does not query the database

    def collect(self) -> Iterable[Metric]:
        with self._database.reading() as session:
            update_counts = metrics.updates_by_state(session)
            release_counts = metrics.releases_by_state(session)
            release_marks = metrics.release_marks(session)
            stage_counts = metrics.stages_by_kind_and_state(session)
            durations = metrics.seconds_by_kind(session)
        updates = GaugeMetricFamily("pathswitch_updates", "Updates by state", labels=["state"])
        for state, count in update_counts.items():
            updates.add_metric([state], count)
        releases = GaugeMetricFamily("pathswitch_releases", "Releases by state", labels=["state"])
        for state, count in release_counts.items():
            releases.add_metric([state], count)
        marks = GaugeMetricFamily(
            "pathswitch_release_timestamp_seconds",
            "When the live and the latest release entered each state",
            labels=["model", "version", "state"],
        )
        for mark in release_marks:
            marks.add_metric([mark.model, str(mark.version), mark.state], mark.at.timestamp())
        stages = GaugeMetricFamily("pathswitch_stages", "Stages by state", labels=["kind", "state"])
        for (kind, state), count in stage_counts.items():
            stages.add_metric([kind, state], count)
        seconds = SummaryMetricFamily(
            "pathswitch_stage_seconds", "Wall-clock time of finished stages", labels=["kind"]
        )
        for kind, (count, total) in durations.items():
            seconds.add_metric([kind], count, total)
        return updates, releases, marks, stages, seconds
