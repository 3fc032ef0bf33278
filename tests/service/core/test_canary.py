"""What is counted of two versions, and what it says about the one that is tried."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from service.core.canary import Verdict, judge
from service.core.serving_specs import CanarySpec, ServingSpec, ShadowSpec
from service.core.traffic import BOUNDS, NOTHING, Histogram, Traffic

SPEC = CanarySpec(seconds=60, max_seconds=600, min_requests=50, max_error_rate=0.02, max_latency_ratio=1.5)


def took(seconds: float, times: int = 1) -> Histogram:
    histogram = Histogram()
    for _ in range(times):
        histogram = histogram.observed(seconds)
    return histogram


def traffic(
    requests: int, failures: int = 0, first: float = 0.1, token: float = 0.02, loss: float = 3.0
) -> Traffic:
    answered = requests - failures
    return Traffic(
        requests,
        failures,
        0,
        0,
        took(first, answered),
        took(token, answered),
        10 * answered,
        10 * answered * loss,
    )


def test_a_median_is_right_to_a_bucket() -> None:
    histogram = Histogram()
    for seconds in (0.01, 0.02, 0.1, 0.4, 5.0):
        histogram = histogram.observed(seconds)
    median = histogram.median()
    assert median is not None
    assert 0.1 / 1.42 <= median <= 0.1 * 1.42
    assert histogram.total == pytest.approx(5.53)
    assert Histogram().median() is None
    assert took(1e9).median() == BOUNDS[-1]


def test_traffic_adds_up_and_comes_apart() -> None:
    one, other = traffic(10, 1), traffic(5, 2, first=2.0)
    both = one + other
    assert (both.requests, both.failures, both.first_token.count) == (15, 3, 12)
    assert (both - other).first_token.counts == one.first_token.counts
    assert (both - other).first_token.total == pytest.approx(one.first_token.total)
    assert both - both == NOTHING
    assert NOTHING.error_rate == 0
    assert NOTHING.loss is None


def test_it_waits_for_time_and_for_requests_but_not_for_ever() -> None:
    served = traffic(1000)
    assert judge(SPEC, traffic(500), served, 59) is None
    assert judge(SPEC, traffic(49), served, 599) is None
    assert judge(SPEC, traffic(50), served, 60) == Verdict()
    assert judge(SPEC, traffic(3), served, 600) == Verdict()
    assert judge(SPEC, NOTHING, NOTHING, 600) == Verdict()


def test_one_that_clients_leave_before_it_answers_is_given_up() -> None:
    served = replace(traffic(1000), departed=50)
    left = replace(NOTHING, departed=20)
    ended = judge(SPEC, left, served, 1)
    assert ended == Verdict(
        ("clients left 20 of 20 requests before an answer, of the served version 50 of 1050",)
    )
    assert judge(SPEC, replace(NOTHING, departed=19), served, 1) is None
    assert judge(SPEC, replace(NOTHING, departed=3), served, 600) != Verdict()
    # As of the served version, and some more: they have reasons of their own.
    assert judge(SPEC, replace(traffic(80), departed=20), served, 60) == Verdict()


def test_errors_end_it_at_once_but_not_a_single_one() -> None:
    served = traffic(1000, 10)
    assert judge(SPEC, traffic(10, 1), served, 1) is None
    ended = judge(SPEC, traffic(20, 1), served, 1)
    assert ended == Verdict(("1 of 20 requests failed, of the served version 10 of 1000",))
    assert judge(SPEC, traffic(5, 5), served, 1) is not None
    # As many as the served version has, and what is allowed on top.
    assert judge(SPEC, traffic(100, 3), served, 60) == Verdict()


@pytest.mark.parametrize(
    ("slow", "what"), [({"first": 0.2}, "to the first token"), ({"token": 0.04}, "per token")]
)
def test_one_that_is_slower_by_more_than_the_ratio_is_given_up(slow: dict[str, float], what: str) -> None:
    verdict = judge(SPEC, traffic(100, **slow), traffic(1000), 60)
    assert verdict is not None
    assert [what in reason for reason in verdict.reasons] == [True]
    unlimited = SPEC.model_copy(update={"max_latency_ratio": None})
    assert judge(unlimited, traffic(100, **slow), traffic(1000), 60) == Verdict()


def test_a_loss_is_compared_where_it_is_asked_for() -> None:
    spec = ShadowSpec(seconds=60, max_seconds=600, min_requests=50, max_loss_increase=0.01)
    served = traffic(1000)
    assert judge(spec, traffic(60), served, 60) is None, "600 tokens are too few"
    assert judge(spec, traffic(150, loss=3.005), served, 60) == Verdict()
    worse = judge(spec, traffic(150, loss=3.02), served, 60)
    assert worse is not None
    assert worse.reasons[0].startswith("loss 3.0200 nats per token")
    assert judge(SPEC, traffic(150, loss=9.0), served, 60) == Verdict()


def test_how_a_line_is_served_is_closed_and_checked() -> None:
    for bad in (
        {"rollout": {"strategy": "canary", "share": 0}},
        {"rollout": {"strategy": "canary", "seconds": 10, "max_seconds": 5}},
        {"rollout": {"strategy": "blue-green"}},
        {"replicas": {"min": 3, "max": 2}},
        {"limits": {"load_seconds": 0}},
        {"keep": -1},
        {"unknown": 1},
    ):
        with pytest.raises(ValidationError):
            ServingSpec.model_validate(bad)
