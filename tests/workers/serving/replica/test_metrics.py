"""The Prometheus metrics of replicas. Every number in the fixture is unique, so no two can be confused."""

from collections.abc import Iterable, Iterator
from itertools import accumulate, count
from typing import Any, cast

import pytest
from prometheus_client import CONTENT_TYPE_LATEST, Metric
from prometheus_client.parser import text_string_to_metric_families

from service.core.serving import ReplicaReport, Residence, VersionReport
from service.core.traffic import BOUNDS, Histogram, Traffic
from tests.workers.serving.serving_line import version
from workers.serving.engine.port import Engine, EngineStatus
from workers.serving.openai.metrics import metrics_response
from workers.serving.replica.metrics import replica_metrics
from workers.serving.replica.model_pool import LoadedModel

COUNTERS = (
    "requests",
    "failures",
    "refused",
    "departed",
    "prompt_tokens",
    "output_tokens",
    "scored_tokens",
)
GAUGES = {
    "running": "num_running",
    "waiting": "num_waiting",
    "cached_tokens": "cached_tokens",
    "cache_tokens": "cache_tokens",
}
HISTOGRAMS = {"first_token_seconds": "first_token", "token_seconds": "per_token"}

Replicas = dict[tuple[str, str], list[LoadedModel]]
"""Loaded models by model line and replica."""

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class FixedEngine:
    """An engine with a fixed status."""

    def __init__(self, status: EngineStatus) -> None:
        self._status = status

    def status(self) -> EngineStatus:
        return self._status


def loaded_model(number: int, numbers: Iterator[int]) -> LoadedModel:
    """Return a loaded version whose counts are all different."""
    traffic = Traffic(
        **{name: next(numbers) for name in COUNTERS},
        first_token=histogram(numbers),
        per_token=histogram(numbers),
        scored_loss=0.5,
    )
    status = EngineStatus(
        alive=True,
        stalled_seconds=0.0,
        longest_step_seconds=0.0,
        **{name: next(numbers) for name in GAUGES.values()},
    )
    return LoadedModel(version(number), cast(Engine, FixedEngine(status)), traffic)


def histogram(numbers: Iterator[int]) -> Histogram:
    counts = tuple(next(numbers) for _ in range(len(BOUNDS) + 1))
    return Histogram(counts, float(next(numbers)))


@pytest.fixture
def replicas() -> Replicas:
    """Two replicas of one model with the same versions, and one of another model."""
    numbers = count(1)
    loaded = {("line", "replica-0"): (1, 2), ("line", "replica-1"): (1, 2), ("other", "replica-0"): (7,)}
    return {
        replica: [loaded_model(number, numbers) for number in versions]
        for replica, versions in loaded.items()
    }


def families_of(replicas: Replicas) -> list[Metric]:
    return [
        family
        for (name, replica), models in replicas.items()
        for family in replica_metrics(name, ReplicaReport(replica, models[0].version.number), models)
    ]


def exposed(families: Iterable[Metric]) -> str:
    return bytes(metrics_response(families).body).decode()


def samples_in(text: str) -> Samples:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {
        (sample.name.removeprefix("pathswitch_inference_"), frozenset(sample.labels.items())): sample.value
        for sample in samples
    }
    assert len(values) == len(samples), "a sample appears twice"
    return values


def labels(model: str, replica: str, loaded: LoadedModel, **more: str) -> frozenset[tuple[str, str]]:
    return frozenset(
        {"model": model, "replica": replica, "version": str(loaded.version.number), **more}.items()
    )


def each(
    replicas: Replicas,
) -> Iterator[tuple[LoadedModel, dict[str, Any]]]:
    """Yield every loaded model with the arguments of its labels."""
    for (name, replica), models in replicas.items():
        for model in models:
            yield model, {"model": name, "replica": replica, "loaded": model}


@pytest.mark.parametrize("name", COUNTERS)
def test_every_counter_has_a_sample_per_version_and_replica(name: str, replicas: Replicas) -> None:
    samples = samples_in(exposed(families_of(replicas)))
    exported = {key: value for key, value in samples.items() if key[0] == f"{name}_total"}
    assert exported == {
        (f"{name}_total", labels(**where)): getattr(model.traffic, name) for model, where in each(replicas)
    }
    assert len(set(exported.values())) == 5


@pytest.mark.parametrize("name", GAUGES)
def test_every_gauge_has_a_sample_per_version_and_replica(name: str, replicas: Replicas) -> None:
    samples = samples_in(exposed(families_of(replicas)))
    exported = {key: value for key, value in samples.items() if key[0] == name}
    assert exported == {
        (name, labels(**where)): getattr(model.engine.status(), GAUGES[name])
        for model, where in each(replicas)
    }
    assert len(set(exported.values())) == 5


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_buckets_are_cumulative_and_the_last_equals_the_count(name: str, replicas: Replicas) -> None:
    samples = samples_in(exposed(families_of(replicas)))
    for model, where in each(replicas):
        histogram: Histogram = getattr(model.traffic, HISTOGRAMS[name])
        cumulative = list(accumulate(histogram.counts))
        for bound, expected in zip((*map(str, BOUNDS), "+Inf"), cumulative, strict=True):
            assert samples[f"{name}_bucket", labels(**where, le=bound)] == expected
        assert samples[f"{name}_bucket", labels(**where, le="+Inf")] == histogram.count
        assert samples[f"{name}_count", labels(**where)] == histogram.count
        assert samples[f"{name}_sum", labels(**where)] == histogram.total
    exported = [key for key in samples if key[0] == f"{name}_bucket"]
    assert len(exported) == 5 * (len(BOUNDS) + 1)


def test_a_value_equal_to_a_bound_belongs_to_its_bucket() -> None:
    traffic = Traffic(first_token=Histogram().observed(BOUNDS[3]).observed(1000.0))
    status = EngineStatus(True, 0.0, 0.0, 0, 0, 0, 0)
    model = LoadedModel(version(1), cast(Engine, FixedEngine(status)), traffic)
    samples = samples_in(exposed(families_of({("line", "replica-0"): [model]})))
    by_bound = [
        samples["first_token_seconds_bucket", labels("line", "replica-0", model, le=bound)]
        for bound in (*map(str, BOUNDS), "+Inf")
    ]
    assert by_bound == [0] * 3 + [1] * (len(BOUNDS) - 3) + [2]


def test_the_metrics_of_several_replicas_share_one_heading_per_name(
    replicas: Replicas,
) -> None:
    text = exposed(families_of(replicas))
    for kind in ("HELP", "TYPE"):
        headings = [line.split()[2] for line in text.splitlines() if line.startswith(f"# {kind} ")]
        assert len(headings) == len(set(headings))
        assert {heading.removeprefix("pathswitch_inference_") for heading in headings} == {
            *(f"{name}_total" for name in COUNTERS),
            *GAUGES,
            *HISTOGRAMS,
            "served_version",
            "versions",
        }
    types = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert {types[f"pathswitch_inference_{name}"] for name in COUNTERS} == {"counter"}
    assert {types[f"pathswitch_inference_{name}"] for name in HISTOGRAMS} == {"histogram"}
    assert {types[f"pathswitch_inference_{name}"] for name in GAUGES} == {"gauge"}
    assert metrics_response([]).headers["content-type"] == CONTENT_TYPE_LATEST


def test_the_served_version_and_the_state_of_every_version_are_exported() -> None:
    versions = (
        VersionReport(1, Residence.READY),
        VersionReport(2, Residence.LOADING),
        VersionReport(3, Residence.FAILED, "no room"),
    )
    families = [
        *replica_metrics("line", ReplicaReport("replica-0", 2, versions), []),
        *replica_metrics("line", ReplicaReport("replica-1", None, versions[2:]), []),
    ]
    samples = samples_in(exposed(families))
    first, second = ({"model": "line", "replica": f"replica-{number}"} for number in (0, 1))
    assert samples == {
        ("served_version", frozenset(first.items())): 2,
        **{
            ("versions", frozenset((first | {"version": number, "state": state}).items())): 1
            for number, state in (("1", "ready"), ("2", "loading"), ("3", "failed"))
        },
        ("versions", frozenset((second | {"version": "3", "state": "failed"}).items())): 1,
    }


def test_a_retired_engine_and_its_replacement_are_counted_together() -> None:
    numbers = count(1)
    retired, current = loaded_model(1, numbers), loaded_model(1, numbers)
    samples = samples_in(exposed(families_of({("line", "replica-0"): [current, retired]})))
    where = labels("line", "replica-0", current)
    assert samples["requests_total", where] == retired.traffic.requests + current.traffic.requests
    assert samples["running", where] == sum(model.engine.status().num_running for model in (retired, current))
