"""Rates equal closed forms written out by hand."""

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.schedules import SCHEDULES, run_rate, trunk_rate, warmup_steps
from service.core.stage_specs import RunPath


def branch_rate(step: Any, steps: Any, peak_lr: Any, **shape: Any) -> Any:
    """Rate of a branch, which consists of decay only."""
    return run_rate(step, RunPath(decay_steps=steps, stream_steps=steps, **shape), peak_lr)


def test_the_trunk_warms_up_linearly_and_then_stays_at_the_peak() -> None:
    rates = [trunk_rate(step, 0.8, 4) for step in (1, 2, 3, 4, 5, 10**9)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_without_warmup_the_first_step_is_at_the_peak() -> None:
    assert trunk_rate(1, 0.5, 0) == 0.5


@pytest.mark.parametrize(
    ("requested", "first_version", "expected"),
    [(20, 1000, 20), (20, 100, 10), (20, 101, 11), (20, 1, 0), (20, 2, 1), (0, 1000, 0)],
)
def test_warmup_takes_at_most_a_tenth_of_the_first_version_and_leaves_its_branch_a_step(
    requested: int, first_version: int, expected: int
) -> None:
    assert warmup_steps(requested, first_version) == expected


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "closed_form"),
    [
        ("1-sqrt", lambda x, m: m + (1 - m) * (1 - x**0.5)),
        ("linear", lambda x, m: m * x + 1 - x),
        ("cosine", lambda x, m: m + (1 - m) * math.cos(math.pi * x / 2) ** 2),
    ],
)
def test_shapes_follow_their_closed_forms(shape: str, closed_form: Any, floor: float) -> None:
    for k in range(1, 10):
        assert branch_rate(k, 9, 2.0, shape=shape, floor=floor) == pytest.approx(
            2 * closed_form(k / 10, floor)
        )


def test_the_inverse_shape_interpolates_the_reciprocal_rate() -> None:
    for k in range(1, 10):
        x = k / 10
        assert 1 / branch_rate(k, 9, 2.0, shape="inverse", floor=0.1) == pytest.approx(
            x / 0.2 + (1 - x) / 2.0
        )


def test_multi_step_drops_at_its_two_cuts() -> None:
    rates = [branch_rate(k, 9, 1.0, shape="multi_step", cuts=(0.4, 0.8)) for k in range(1, 10)]
    assert rates == [1.0] * 3 + [0.316] * 4 + [0.1] * 2


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 400), st.floats(0.01, 0.5))
def test_every_shape_falls_from_below_the_peak_to_above_the_floor(shape: Any, steps: Any, floor: Any) -> None:
    options = {"floor": 0.0, "cuts": (0.3, 0.7)} if shape == "multi_step" else {"floor": floor, "cuts": ()}
    rates = [branch_rate(k, steps, 1.0, shape=shape, **options) for k in range(1, steps + 1)]
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert rates[0] <= 1.0
    assert rates[-1] >= options["floor"]


@given(st.sampled_from(["1-sqrt", "linear", "cosine"]), st.integers(1, 400))
def test_no_batch_is_read_at_rate_zero(shape: Any, steps: Any) -> None:
    assert branch_rate(steps, steps, 1.0, shape=shape) > 0


@pytest.mark.parametrize("step", [0, 11])
def test_a_step_outside_the_run_raises(step: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        branch_rate(step, 10, 1.0, shape="linear")


def test_a_run_warms_up_holds_and_decays() -> None:
    path = RunPath(warmup_steps=4, hold_steps=2, decay_steps=3, shape="linear", stream_steps=9)
    rates = [run_rate(k, path, 0.8) for k in range(1, 10)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.6, 0.4, 0.2])


def test_a_run_can_rise_from_the_floor_or_stay_at_it() -> None:
    risen = RunPath(warmup_steps=3, warmup_from=0.1, decay_steps=1, floor=0.1, shape="cosine", stream_steps=4)
    assert [run_rate(k, risen, 1.0) for k in range(1, 5)] == pytest.approx([0.4, 0.7, 1.0, 0.55])
    low = RunPath(hold_steps=2, level=0.1, stream_steps=2)
    assert [run_rate(k, low, 1.0) for k in (1, 2)] == [0.1, 0.1]
