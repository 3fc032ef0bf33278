"""Closed forms for the cost of a line of versions."""

import random

import pytest

from service.core.costs import Amount, continual, from_scratch, path_switching, stage_cost
from service.core.paradigm_specs import DecaySpec, FixedLength, ProportionalLength
from service.core.paradigms.path_switching import plan_path_switching
from service.core.stage_specs import TRAINING_KINDS, StageKind, TrainStage
from tests.support.specs import ledger_of, line_spec, plan_context


def ends_of(steps: list[int]) -> list[int]:
    return [sum(steps[: i + 1]) for i in range(len(steps))]


@pytest.mark.parametrize("versions", range(1, 65))
def test_equal_versions_match_the_cost_formulas(versions: int) -> None:
    steps = 1000
    ends = ends_of([steps] * versions)
    assert from_scratch(ends) == steps * versions * (versions + 1) // 2
    assert continual(ends) == steps * versions
    assert path_switching(ends, [600] * versions) == 1000 * versions + 600 * (versions - 1)


@pytest.mark.parametrize(
    ("versions", "fraction", "percent"),
    [(4, 0.6, 58.0), (4, 0.4, 52.0), (4, 0.2, 46.0), (4, 0.1, 43.0), (10, 0.6, 28.0), (20, 0.6, 15.0)],
)
def test_ratios_to_from_scratch_match_the_method(versions: int, fraction: float, percent: float) -> None:
    ends = ends_of([1000] * versions)
    cost = path_switching(ends, [round(1000 * fraction)] * versions)
    assert round(100 * cost / from_scratch(ends), 1) == pytest.approx(percent, abs=0.1)


@pytest.mark.parametrize("versions", [1, 2, 3, 8, 33, 64])
@pytest.mark.parametrize(
    "length", [FixedLength(fraction=0.6), FixedLength(fraction=0.1), ProportionalLength()]
)
def test_plans_of_unequal_versions_match_the_cost_formula(
    versions: int, length: FixedLength | ProportionalLength
) -> None:
    draw = random.Random(versions)
    steps = [draw.randrange(100, 2000) for _ in range(versions)]
    trunk_step, trained, branches = 0, 0, []
    for version in range(1, versions + 1):
        context = plan_context(ledger_of(*steps[:version]), DecaySpec(length=length), trunk_step=trunk_step)
        plan = plan_path_switching(context)
        assert not plan.notes["branch_clamped"]
        for stage in plan.stages:
            if stage.kind in TRAINING_KINDS:
                trained += TrainStage.model_validate(stage.spec).total_steps
            if stage.kind == StageKind.TRAIN_BRANCH:
                branches.append(TrainStage.model_validate(stage.spec).total_steps)
        trunk_step = plan.branch_point
    ends = ends_of(steps)
    assert trained == path_switching(ends, branches)
    assert continual(ends) == sum(steps)
    assert from_scratch(ends) == sum((versions - i) * count for i, count in enumerate(steps))


def test_no_versions_cost_nothing() -> None:
    assert from_scratch([]) == continual([]) == path_switching([], []) == 0


def test_amounts_add_up_and_scale() -> None:
    total = Amount(10, 100.0, 1.0) + Amount(30, 300.0, 3.0)
    assert total == Amount(40, 400.0, 4.0)
    assert total.scaled_to(80) == Amount(80, 800.0, 8.0)
    assert Amount().scaled_to(5) == Amount(5, 0.0, 0.0)


def trunk_of(steps: int, from_step: int = 0) -> TrainStage:
    return TrainStage(
        line=line_spec(batch_rows=1, sequence_length=10),
        ledger=ledger_of(steps),
        from_step=from_step,
        to_step=steps,
        start_key=None,
        checkpoint_every=100,
    )


def test_a_resumed_stage_counts_what_it_trained_anew() -> None:
    """20 steps, of which this stage trained the last 5, in 10 seconds."""
    result = {"tokens": 200, "flops": 2000.0, "trained_tokens": 50, "device_seconds": 10.0}
    cost = stage_cost(trunk_of(20), result, reused=False)
    assert cost.whole == Amount(200, 2000.0, 40.0)
    assert cost.anew == Amount(50, 500.0, 10.0)
    assert cost.reused == Amount(150, 1500.0, 30.0)


def test_a_reused_stage_counts_its_own_steps_at_the_rates_of_the_original_training() -> None:
    result = {"tokens": 300, "flops": 3000.0, "trained_tokens": 300, "device_seconds": 30.0}
    cost = stage_cost(trunk_of(20, from_step=10), result, reused=True)
    assert cost.anew == Amount()
    assert cost.whole == cost.reused == Amount(100, 1000.0, 10.0)
