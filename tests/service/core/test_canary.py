"""Traffic counts of two versions, and the verdict on the one that is on trial."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from service.core.canary import TrialVerdict, judge
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


def test_a_median_is_exact_to_one_bucket() -> None:
    histogram = Histogram()
    for seconds in (0.01, 0.02, 0.1, 0.4, 5.0):
        histogram = histogram.observed(seconds)
    median = histogram.median()
    assert median is not None
    assert 0.1 / 1.42 <= median <= 0.1 * 1.42
    assert histogram.total == pytest.approx(5.53)
    assert Histogram().median() is None
    assert took(1e9).median() == BOUNDS[-1]


def test_traffic_can_be_added_and_subtracted() -> None:
    one, other = traffic(10, 1), traffic(5, 2, first=2.0)
    both = one + other
    assert (both.requests, both.failures, both.first_token.count) == (15, 3, 12)
    assert (both - other).first_token.counts == one.first_token.counts
    assert (both - other).first_token.total == pytest.approx(one.first_token.total)
    assert both - both == NOTHING
    assert NOTHING.error_rate == 0
    assert NOTHING.loss is None


def test_a_trial_waits_for_time_and_requests_up_to_a_limit() -> None:
    served = traffic(1000)
    assert judge(SPEC, traffic(500), served, 59) is None
    assert judge(SPEC, traffic(49), served, 599) is None
    assert judge(SPEC, traffic(50), served, 60) == TrialVerdict()
    assert judge(SPEC, traffic(3), served, 600) == TrialVerdict()
    assert judge(SPEC, NOTHING, NOTHING, 600) == TrialVerdict()


def test_a_version_that_clients_leave_is_rejected() -> None:
    served = replace(traffic(1000), departed=50)
    left = replace(NOTHING, departed=20)
    ended = judge(SPEC, left, served, 1)
    assert ended == TrialVerdict(
        (
            "clients abandoned 20 of 20 requests before a response, compared with 50 of 1050 for the served version",
        )
    )
    assert judge(SPEC, replace(NOTHING, departed=19), served, 1) is None
    assert judge(SPEC, replace(NOTHING, departed=3), served, 600) != TrialVerdict()
    # Clients leave the served version too: somewhat more are tolerated.
    assert judge(SPEC, replace(traffic(80), departed=20), served, 60) == TrialVerdict()


def test_errors_end_a_trial_early_but_a_single_one_does_not() -> None:
    served = traffic(1000, 10)
    assert judge(SPEC, traffic(10, 1), served, 1) is None
    ended = judge(SPEC, traffic(20, 1), served, 1)
    assert ended == TrialVerdict(("1 of 20 requests failed, against 10 of 1000 for the served version",))
    assert judge(SPEC, traffic(5, 5), served, 1) is not None
    # The rate of the served version plus what the spec allows.
    assert judge(SPEC, traffic(100, 3), served, 60) == TrialVerdict()


@pytest.mark.parametrize(
    ("slow", "what"), [({"first": 0.2}, "to the first token"), ({"token": 0.04}, "per token")]
)
def test_a_version_slower_than_the_ratio_allows_is_rejected(slow: dict[str, Any], what: str) -> None:
    verdict = judge(SPEC, traffic(100, **slow), traffic(1000), 60)
    assert verdict is not None
    assert [what in reason for reason in verdict.reasons] == [True]
    unlimited = SPEC.model_copy(update={"max_latency_ratio": None})
    assert judge(unlimited, traffic(100, **slow), traffic(1000), 60) == TrialVerdict()


def test_losses_are_compared_only_if_the_spec_limits_them() -> None:
    spec = ShadowSpec(seconds=60, max_seconds=600, min_requests=50, max_loss_increase=0.01)
    served = traffic(1000)
    assert judge(spec, traffic(60), served, 60) is None, "600 tokens are too few"
    assert judge(spec, traffic(150, loss=3.005), served, 60) == TrialVerdict()
    worse = judge(spec, traffic(150, loss=3.02), served, 60)
    assert worse is not None
    assert worse.reasons[0].startswith("loss 3.0200 nats per token")
    assert judge(SPEC, traffic(150, loss=9.0), served, 60) == TrialVerdict()


def test_serving_specs_reject_invalid_values() -> None:
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
