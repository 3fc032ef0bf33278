"""The shortest branch that is nearly as good as the best is chosen."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.core.auto_length import Prediction, candidate_lengths, cheapest
from service.core.paradigm_specs import AutoLength, paradigm_of
from service.core.paradigms.branching import branch_length


def predictions(losses: dict[int, float]) -> list[Prediction]:
    return [Prediction(steps=steps, loss=loss) for steps, loss in losses.items()]


def test_the_shortest_within_the_tolerance_of_the_best_is_chosen() -> None:
    found = predictions({10: 3.010, 20: 3.0029, 40: 3.000, 80: 3.001})
    assert [one.steps for one in cheapest(found, 0.003)] == [20, 40]
    assert [one.steps for one in cheapest(found, 0.002)] == [40, 40]
    assert [one.steps for one in cheapest(found, 0.02)] == [10, 40]


@given(st.dictionaries(st.integers(1, 10**6), st.floats(0.1, 12), min_size=1), st.floats(1e-6, 1))
def test_no_shorter_branch_is_good_enough(losses: dict[int, float], tolerance: float) -> None:
    chosen, best = cheapest(predictions(losses), tolerance)
    assert best.loss == min(losses.values())
    assert chosen.loss <= best.loss + math.log1p(tolerance)
    assert all(
        loss > best.loss + math.log1p(tolerance) for steps, loss in losses.items() if steps < chosen.steps
    )


@given(st.integers(1, 10**5), st.integers(1, 10**6))
def test_candidates_rise_from_the_shortest_to_the_longest(shortest: int, longest: int) -> None:
    lengths = candidate_lengths(shortest, longest)
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == longest
    assert lengths[0] == min(shortest, longest)
    assert len(lengths) <= 30


def test_without_a_prediction_a_branch_takes_a_tenth_of_all_steps_within_bounds() -> None:
    assert branch_length(AutoLength(), 100, 300) == (30, None)
    assert branch_length(AutoLength(max=0.2), 100, 300) == (20, "max")
    assert branch_length(AutoLength(), 100, 300, chosen=77) == (77, None)
    assert branch_length(AutoLength(), 100, 300, chosen=170) == (100, "max")


@pytest.mark.parametrize(
    "paradigm",
    [
        {"name": "wsd_s", "decay": {"length": {"rule": "auto"}}},
        {"name": "from_scratch", "schedule": "wsd", "decay": {"length": {"rule": "auto"}}},
        {"name": "merge", "span": {"rule": "auto"}},
        {"name": "path_switching", "decay": {"length": {"rule": "auto", "min": 0.5, "max": 0.1}}},
    ],
)
def test_the_rule_auto_needs_a_trunk(paradigm: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        paradigm_of(paradigm)
