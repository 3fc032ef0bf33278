"""Costs over HTTP. Every data version has 100 steps of 2048 tokens."""

from typing import Any

import pytest

from service.core.executor import RunError
from service.core.stage_specs import StageKind
from tests.support.control_plane import ControlPlane
from tests.support.specs import PLAIN

STEP = 2048
NOTHING = {"tokens": 0, "flops": 0.0, "device_seconds": 0.0}


@pytest.fixture
def model(plane: ControlPlane, name: str) -> str:
    """A model with two versions. Its branches have 10 and 20 steps, 0.1 of all steps so far."""
    plane.add_dataset(name, [f"{name} a", "b"])
    plane.add_model(name, name)
    plane.push(name, f"{name} c", "d")
    plane.finish(name)
    return name


def costs_of(plane: ControlPlane, model: str, **query: int) -> dict[str, Any]:
    answer = plane.http.get(f"/models/{model}/costs", params=query)
    assert answer.status_code == 200, answer.text
    costs: dict[str, Any] = answer.json()
    return costs


def test_the_costs_of_a_line_are_compared_with_other_ways_of_training(
    plane: ControlPlane, model: str
) -> None:
    costs = costs_of(plane, model)
    # The line took E_2 + d_1 = 200 + 10 steps; from scratch it takes E_1 + E_2 = 300.
    assert costs["ratio_to_from_scratch"] == pytest.approx(210 / 300)
    assert costs["versions"] == [
        {
            "number": 1,
            "data_version": 1,
            "tokens": 100 * STEP,
            "flops": 2e9,
            "device_seconds": 2.0,
            "reused_tokens": 0,
            "from_scratch_tokens": 100 * STEP,
        },
        {
            "number": 2,
            "data_version": 2,
            "tokens": 110 * STEP,
            "flops": 2e9,
            "device_seconds": 2.0,
            "reused_tokens": 0,
            "from_scratch_tokens": 200 * STEP,
        },
    ]
    assert costs["totals"] == {
        "spent": {"tokens": 210 * STEP, "flops": 4e9, "device_seconds": 4.0},
        "reused": NOTHING,
        "wasted": NOTHING,
        "extra": NOTHING,
    }
    assert costs["from_scratch"] == {"tokens": 300 * STEP, "flops": pytest.approx(4e9 * 300 / 210)}
    assert costs["continual"] == {"tokens": 200 * STEP, "flops": pytest.approx(4e9 * 200 / 210)}


def test_the_forecast_plans_the_next_version(plane: ControlPlane, model: str) -> None:
    """The trunk is at step 180. The next branch has 30 steps up to 300, after 90 more steps of trunk."""
    forecast = costs_of(plane, model)["forecast"]
    assert forecast == {
        "new_tokens": 100 * STEP,
        "tokens": 120 * STEP,
        "flops": pytest.approx(4e9 * 120 / 210),
        # At the speed of version 2, whose 90 trunk steps and 20 branch steps took one second each.
        "device_seconds": pytest.approx(2.0 * 120 / 110),
        "from_scratch_tokens": 300 * STEP,
        "ratio_to_from_scratch": pytest.approx((210 + 120) / (300 + 300)),
    }
    smaller = costs_of(plane, model, tokens=50 * STEP - 5)["forecast"]
    assert smaller["new_tokens"] == 50 * STEP - 5
    assert smaller["from_scratch_tokens"] == 250 * STEP
    assert smaller["tokens"] == (50 + 20) * STEP  # the branch has at most 0.4 of the version's own steps
    assert plane.client.costs(model, tokens=1).forecast is not None
    assert plane.http.get(f"/models/{model}/costs", params={"tokens": 0}).status_code == 422


def test_the_forecast_after_an_exclusion_has_nothing_to_replay_for_a_first_version(
    plane: ControlPlane, name: str
) -> None:
    plane.add_dataset(name, [f"{name} a", "b"])
    plane.add_model(name, name, training={"replay_fraction": 0.2})
    plane.push(name, f"{name} c", "d").raise_for_status()
    plane.finish(name)
    plane.client.exclude_version(name, 1, "a mirror")
    forecast = plane.client.costs(name).forecast
    assert forecast is not None
    plane.push(name, f"{name} e", "f").raise_for_status()
    plane.finish(name)
    version = plane.client.model_version(name, 3)
    assert version.final_step == 100 + 125
    assert forecast.tokens == plane.client.costs(name).versions[-1].tokens


def test_a_line_that_starts_late_has_no_costs_of_earlier_versions(plane: ControlPlane, model: str) -> None:
    late = f"{model}-late"
    plane.add_model(late, model, training={"seed": 1, "replay_fraction": 0.0})
    costs = costs_of(plane, late)
    assert [row["from_scratch_tokens"] for row in costs["versions"]] == [200 * STEP]
    assert costs["ratio_to_from_scratch"] == 1.0
    assert costs["continual"]["tokens"] == 200 * STEP


def test_stages_trained_by_another_line_are_reused_and_counted_in_full(
    plane: ControlPlane, model: str
) -> None:
    twin = f"{model}-twin"
    plane.client.create_model(PLAIN | {"name": twin, "dataset": model, "auto_update": False})
    for number in (1, 2):
        plane.client.start_update(twin, data_version=number)
        plane.finish(twin)
    costs, original = costs_of(plane, twin), costs_of(plane, model)
    assert costs["ratio_to_from_scratch"] == original["ratio_to_from_scratch"]
    assert costs["totals"]["spent"] == NOTHING
    assert costs["totals"]["reused"] == original["totals"]["spent"]
    assert [row["device_seconds"] for row in costs["versions"]] == [0.0, 0.0]
    assert [row["reused_tokens"] for row in costs["versions"]] == [100 * STEP, 110 * STEP]


def test_a_failed_update_keeps_its_trunk_and_wastes_its_branch(plane: ControlPlane, model: str) -> None:
    error = RunError("", "stage_input_invalid", "no", retryable=False)
    plane.fail_next(StageKind.EXPORT, error)
    plane.push(model, f"{model} e", "f")
    plane.finish(model)
    after_failure = costs_of(plane, model)
    assert after_failure["ratio_to_from_scratch"] == pytest.approx(210 / 300)
    assert after_failure["totals"]["spent"]["tokens"] == (210 + 90) * STEP
    assert after_failure["totals"]["wasted"]["tokens"] == 30 * STEP
    # The next version continues the trunk at step 270 of 400, and branches at 360.
    plane.push(model, f"{model} g", "h")
    plane.finish(model)
    costs = costs_of(plane, model)
    assert [row["from_scratch_tokens"] for row in costs["versions"]] == [100 * STEP, 200 * STEP, 400 * STEP]
    assert costs["ratio_to_from_scratch"] == pytest.approx((210 + 90 + 90 + 40) / (300 + 400))
    assert costs["totals"]["wasted"]["tokens"] == 30 * STEP


def test_failed_attempts_are_wasted_device_seconds(plane: ControlPlane, name: str) -> None:
    error = RunError("", "diverged", "nan", retryable=False)
    plane.add_dataset(name, [f"{name} a", "b"])
    plane.fail_next(StageKind.TRAIN_TRUNK, error)
    plane.add_model(name, name)
    costs = costs_of(plane, name)
    assert costs["totals"]["wasted"]["device_seconds"] > 0
    assert costs["totals"]["spent"] == NOTHING
    assert (costs["ratio_to_from_scratch"], costs["versions"], costs["forecast"]) == (None, [], None)
    assert costs["from_scratch"] == costs["continual"] == {"tokens": 0, "flops": 0.0}


def test_an_unknown_model_has_no_costs(plane: ControlPlane) -> None:
    assert plane.http.get("/models/nobody/costs").status_code == 404
