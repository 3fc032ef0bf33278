"""What Prometheus reads of replicas whose every number is another."""

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
from workers.serving.metrics import metrics_response, replica_metrics
from workers.serving.residency import Resident

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

Replicas = dict[tuple[str, str], list[Resident]]
"""What is loaded, by model and replica."""

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class StillEngine:
    """Whose status never changes."""

    def __init__(self, status: EngineStatus) -> None:
        self._status = status

    def status(self) -> EngineStatus:
        return self._status


def resident(number: int, numbers: Iterator[int]) -> Resident:
    """A version that is loaded, with numbers of its own for all that can be counted."""
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
    return Resident(version(number), cast(Engine, StillEngine(status)), traffic)


def histogram(numbers: Iterator[int]) -> Histogram:
    counts = tuple(next(numbers) for _ in range(len(BOUNDS) + 1))
    return Histogram(counts, float(next(numbers)))


@pytest.fixture
def replicas() -> Replicas:
    """Two of one model, with the same versions, and one of another."""
    numbers = count(1)
    places = {("line", "replica-0"): (1, 2), ("line", "replica-1"): (1, 2), ("other", "replica-0"): (7,)}
    return {place: [resident(number, numbers) for number in versions] for place, versions in places.items()}


def families_of(replicas: Replicas) -> list[Metric]:
    return [
        family
        for (model, replica), residents in replicas.items()
        for family in replica_metrics(model, ReplicaReport(replica, residents[0].version.number), residents)
    ]


def exposed(families: Iterable[Metric]) -> str:
    return bytes(metrics_response(families).body).decode()


def read(text: str) -> Samples:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {
        (sample.name.removeprefix("pathswitch_inference_"), frozenset(sample.labels.items())): sample.value
        for sample in samples
    }
    assert len(values) == len(samples), "a sample is told twice"
    return values


def labels(model: str, replica: str, held: Resident, **more: str) -> frozenset[tuple[str, str]]:
    return frozenset(
        {"model": model, "replica": replica, "version": str(held.version.number), **more}.items()
    )


def each(
    replicas: Replicas,
) -> Iterator[tuple[Resident, dict[str, Any]]]:
    """All that are loaded, each with where it is."""
    for (model, replica), residents in replicas.items():
        for held in residents:
            yield held, {"model": model, "replica": replica, "held": held}


@pytest.mark.parametrize("name", COUNTERS)
def test_every_count_is_told_of_every_version_on_every_replica(name: str, replicas: Replicas) -> None:
    samples = read(exposed(families_of(replicas)))
    told = {key: value for key, value in samples.items() if key[0] == f"{name}_total"}
    assert told == {
        (f"{name}_total", labels(**where)): getattr(held.traffic, name) for held, where in each(replicas)
    }
    assert len(set(told.values())) == 5


@pytest.mark.parametrize("name", GAUGES)
def test_what_every_engine_does_at_the_moment_is_told(name: str, replicas: Replicas) -> None:
    samples = read(exposed(families_of(replicas)))
    told = {key: value for key, value in samples.items() if key[0] == name}
    assert told == {
        (name, labels(**where)): getattr(held.engine.status(), GAUGES[name]) for held, where in each(replicas)
    }
    assert len(set(told.values())) == 5


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_buckets_have_all_that_is_below_them_and_the_last_has_the_count(
    name: str, replicas: Replicas
) -> None:
    samples = read(exposed(families_of(replicas)))
    for held, where in each(replicas):
        histogram: Histogram = getattr(held.traffic, HISTOGRAMS[name])
        below = list(accumulate(histogram.counts))
        for bound, expected in zip((*map(str, BOUNDS), "+Inf"), below, strict=True):
            assert samples[f"{name}_bucket", labels(**where, le=bound)] == expected
        assert samples[f"{name}_bucket", labels(**where, le="+Inf")] == histogram.count
        assert samples[f"{name}_count", labels(**where)] == histogram.count
        assert samples[f"{name}_sum", labels(**where)] == histogram.total
    told = [key for key in samples if key[0] == f"{name}_bucket"]
    assert len(told) == 5 * (len(BOUNDS) + 1)


def test_a_value_at_a_bound_is_in_the_bucket_up_to_it() -> None:
    traffic = Traffic(first_token=Histogram().observed(BOUNDS[3]).observed(1000.0))
    status = EngineStatus(True, 0.0, 0.0, 0, 0, 0, 0)
    held = Resident(version(1), cast(Engine, StillEngine(status)), traffic)
    samples = read(exposed(families_of({("line", "replica-0"): [held]})))
    by_bound = [
        samples["first_token_seconds_bucket", labels("line", "replica-0", held, le=bound)]
        for bound in (*map(str, BOUNDS), "+Inf")
    ]
    assert by_bound == [0] * 3 + [1] * (len(BOUNDS) - 3) + [2]


def test_several_replicas_are_told_under_one_heading_a_name(
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


def test_which_version_answers_and_which_are_held_is_told() -> None:
    held = (
        VersionReport(1, Residence.READY),
        VersionReport(2, Residence.LOADING),
        VersionReport(3, Residence.FAILED, "no room"),
    )
    families = [
        *replica_metrics("line", ReplicaReport("replica-0", 2, held), []),
        *replica_metrics("line", ReplicaReport("replica-1", None, held[2:]), []),
    ]
    samples = read(exposed(families))
    of_first, of_second = ({"model": "line", "replica": f"replica-{place}"} for place in (0, 1))
    assert samples == {
        ("served_version", frozenset(of_first.items())): 2,
        **{
            ("versions", frozenset((of_first | {"version": number, "state": state}).items())): 1
            for number, state in (("1", "ready"), ("2", "loading"), ("3", "failed"))
        },
        ("versions", frozenset((of_second | {"version": "3", "state": "failed"}).items())): 1,
    }


def test_an_engine_that_is_let_go_of_and_the_one_in_its_place_are_told_as_one() -> None:
    numbers = count(1)
    leaving, held = resident(1, numbers), resident(1, numbers)
    samples = read(exposed(families_of({("line", "replica-0"): [held, leaving]})))
    where = labels("line", "replica-0", held)
    assert samples["requests_total", where] == leaving.traffic.requests + held.traffic.requests
    assert samples["running", where] == sum(one.engine.status().num_running for one in (leaving, held))
