"""The arithmetic of path switching: lengths, clamps, tiny versions, replay, and the cost of N versions."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.errors import StageInputInvalid
from service.core.ledger import new_rows_before, total_steps
from service.core.paradigm_specs import BranchSpec, DecaySpec, FixedLength, ProportionalLength
from service.core.paradigms import PARADIGMS
from service.core.paradigms.branching import branch_geometry, branch_length
from service.core.specs import TrainingSpec
from service.core.stage_specs import StageKind, TrainStage
from tests.support.specs import ledger_of, line_spec, plan_context

LINE = line_spec()


def walk(decay: Any, *batches: Any, replay: float = 0.0) -> Any:
    """The branch geometries of a line that makes a version of every data version."""
    geometries, trunk = [], 0
    for count in range(1, len(batches) + 1):
        geometry = branch_geometry(decay, ledger_of(*batches[:count], replay=replay), trunk, LINE)
        geometries.append(geometry)
        trunk = geometry.point
    return geometries


def trained_steps(geometries: Any) -> Any:
    """Steps of the whole line: the trunk to the last branch point, and every branch."""
    return geometries[-1].point + sum(geometry.steps for geometry in geometries)


@pytest.mark.parametrize(
    ("decay", "ratio"),
    [
        (DecaySpec(length=FixedLength(fraction=0.6)), 0.58),
        (DecaySpec(length=FixedLength(fraction=0.4)), 0.52),
        (DecaySpec(length=FixedLength(fraction=0.2)), 0.46),
        (DecaySpec(length=FixedLength(fraction=0.1)), 0.43),
        (DecaySpec(length=ProportionalLength(fraction=0.1)), 0.46),
        (DecaySpec(length=ProportionalLength(fraction=0.1), replay_fraction=0.5), 0.48),
    ],
)
def test_four_equal_versions_cost_the_papers_share_of_from_scratch(decay: Any, ratio: float) -> None:
    steps = [1000] * 4
    from_scratch = sum(sum(steps[:n]) for n in range(1, 5))
    assert trained_steps(walk(decay, *steps)) / from_scratch == pytest.approx(ratio, abs=1e-9)


@pytest.mark.parametrize(("versions", "percent"), [(2, 75.4), (4, 50.9), (8, 32.2), (16, 18.2)])
def test_the_defaults_cost_half_of_from_scratch_for_four_versions(versions: int, percent: float) -> None:
    """15 % of the trunk's rows are replayed, and a branch's replay fits into its length."""
    steps = [1000] * versions
    from_scratch = sum(sum(steps[:n]) for n in range(1, versions + 1))
    cost = trained_steps(walk(BranchSpec(), *steps, replay=TrainingSpec().replay_fraction))
    assert 100 * cost / from_scratch == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize(("versions", "percent"), [(10, 28.0), (20, 15.0)])
def test_the_papers_rule_gets_cheaper_with_every_version(versions: int, percent: float) -> None:
    steps = [1000] * versions
    from_scratch = sum(sum(steps[:n]) for n in range(1, versions + 1))
    cost = trained_steps(walk(DecaySpec(length=FixedLength(fraction=0.6)), *steps))
    assert 100 * cost / from_scratch == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize(("versions", "percent"), [(4, 46.0), (10, 23.6), (20, 12.9)])
def test_a_proportional_length_is_capped_at_two_fifths_of_the_version(versions: int, percent: float) -> None:
    steps = [1000] * versions
    from_scratch = sum(sum(steps[:n]) for n in range(1, versions + 1))
    assert 100 * trained_steps(walk(DecaySpec(), *steps)) / from_scratch == pytest.approx(percent, abs=0.05)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=64), st.sampled_from([0.1, 0.3, 0.6, 1.0]))
def test_unequal_versions_cost_all_steps_once_and_earlier_branches_again(steps: Any, fraction: Any) -> None:
    geometries = walk(DecaySpec(length=FixedLength(fraction=fraction)), *steps)
    again = sum(geometry.steps for geometry in geometries[:-1])
    assert trained_steps(geometries) == sum(steps) + again


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=40),
    st.sampled_from([FixedLength(), ProportionalLength(), ProportionalLength(max=4.0, min=0.0)]),
    st.sampled_from([0.0, 0.25, 0.5, 0.9]),
    st.sampled_from(["grown", "kept"]),
)
def test_the_trunk_never_turns_back_and_every_branch_reads_to_the_end(
    steps: Any, length: Any, replay: Any, budget: Any
) -> None:
    decay = DecaySpec(length=length, replay_fraction=replay, replay_budget=budget)
    trunk, end = 0, 0
    for count, geometry in enumerate(walk(decay, *steps), start=1):
        end = sum(steps[:count])
        assert trunk <= geometry.point < end
        assert geometry.steps >= geometry.stream_steps >= 1
        assert geometry.point + geometry.stream_steps == end
        trunk = geometry.point


def test_fractions_are_exact_decimals() -> None:
    # 0.1 * 30 is 3.0000000000000004 in binary, whose ceiling would be 4.
    assert branch_length(FixedLength(fraction=0.1), 300, 300) == (30, None)


@pytest.mark.parametrize(
    ("version", "total", "expected"),
    [
        (1000, 1000, (100, None)),
        (1000, 4000, (400, None)),
        (1000, 9000, (400, "max")),
        (1000, 100, (50, "min")),
        (30, 60, (8, "shortest")),
        (10, 20, (4, "max")),
        (1, 1000, (1, "max")),
    ],
)
def test_a_bounded_length_names_its_bound(version: int, total: int, expected: Any) -> None:
    assert branch_length(DecaySpec().length, version, total) == expected


def test_a_small_version_after_a_large_history_clamps_a_branch_that_may_be_longer_than_it() -> None:
    decay = DecaySpec(length=ProportionalLength(fraction=0.1, max=100.0))
    first, second = walk(decay, 10_000, 20)
    assert (first.point, first.steps, first.clamped) == (9000, 1000, False)
    assert (second.point, second.steps, second.clamped) == (9018, 1002, False)
    # If the trunk is already past the branch point, the branch starts from there.
    third = branch_geometry(decay, ledger_of(10_000, 20, 10), 10_012, LINE)
    assert (third.point, third.steps, third.clamped) == (10_012, 18, True)


def test_replay_has_nothing_to_draw_from_in_the_first_version() -> None:
    first, second = walk(DecaySpec(replay_fraction=0.5), 1000, 1000)
    assert first.replay_fraction == 0
    assert (second.steps, second.stream_steps, second.point) == (200, 100, 1900)


def test_a_kept_budget_leaves_rows_unread_and_counts_them() -> None:
    decay = DecaySpec(replay_fraction=0.5, replay_budget="kept")
    plan = PARADIGMS["path_switching"](plan_context(ledger_of(1000, 1000), decay, trunk_step=900))
    assert plan.branch_point == 1800
    assert plan.final_step == 2000
    assert plan.notes["unread_rows"] == 100 * 16


@given(
    st.lists(st.integers(1, 600), min_size=2, max_size=12),
    st.sampled_from([FixedLength(), ProportionalLength(), ProportionalLength(max=4.0, min=0.0)]),
    st.sampled_from([0.0, 0.3, 0.75]),
    st.sampled_from([0.15, 0.5]),
    st.sampled_from(["grown", "kept"]),
)
def test_with_replay_on_the_trunk_a_branch_reads_every_new_row(
    batches: Any, length: Any, in_branch: Any, on_trunk: Any, budget: Any
) -> None:
    decay = DecaySpec(length=length, replay_fraction=in_branch, replay_budget=budget)
    for count, geometry in enumerate(walk(decay, *batches, replay=on_trunk), start=1):
        ledger = ledger_of(*batches[:count], replay=on_trunk)
        end = total_steps(ledger)
        assert geometry.point + geometry.stream_steps == end
        unread = new_rows_before(LINE, ledger, end) - new_rows_before(LINE, ledger, geometry.point)
        if geometry.replay_fraction and budget == "grown":
            assert unread <= geometry.steps * LINE.batch_rows
            if geometry.steps > 100:
                share = 1 - unread / (geometry.steps * LINE.batch_rows)
                assert share == pytest.approx(in_branch, abs=0.02)
        else:
            assert geometry.steps == geometry.stream_steps


def test_replay_on_the_trunk_makes_every_version_but_the_first_longer() -> None:
    first, second = walk(DecaySpec(length=FixedLength(fraction=0.2)), 800, 800, replay=0.2)
    assert (first.point, first.steps) == (640, 160)
    # T_2 = 800 / (1 - 0.2) = 1000
    assert (second.point, second.steps) == (1600, 200)


def test_old_rows_that_the_trunk_replays_count_towards_a_kept_branchs_share() -> None:
    decay = DecaySpec(length=FixedLength(fraction=0.2), replay_fraction=0.5, replay_budget="kept")
    ledger = ledger_of(800, 800, replay=0.2)
    plan = PARADIGMS["path_switching"](plan_context(ledger, decay, trunk_step=640))
    # 200 steps of 16 rows: half of the rows are old, and the trunk brings a fifth.
    assert plan.notes["unread_rows"] == pytest.approx(200 * 16 * 0.3, abs=32)


def test_a_trunk_past_the_end_of_the_ledger_has_no_plan() -> None:
    with pytest.raises(StageInputInvalid, match="past the last step 100"):
        PARADIGMS["path_switching"](plan_context(ledger_of(100), DecaySpec(), trunk_step=100))


def test_a_version_of_one_step_gets_initial_weights_as_its_trunk_and_a_branch_of_one_step() -> None:
    plan = PARADIGMS["path_switching"](plan_context(ledger_of(1), DecaySpec()))
    trunk, branch = (TrainStage.model_validate(stage.spec) for stage in plan.stages[:2])
    assert (trunk.from_step, trunk.to_step) == (0, 0)
    assert (branch.from_step, branch.to_step) == (0, 1)


def test_a_trunk_at_the_branch_point_needs_no_segment() -> None:
    plan = PARADIGMS["path_switching"](plan_context(ledger_of(1000), DecaySpec(), trunk_step=900))
    assert plan.stages[0].kind == StageKind.TRAIN_BRANCH
    assert plan.stages[0].needs == ("pack-1",)


def test_two_branch_lengths_share_the_trunk_up_to_the_earlier_branch_point() -> None:
    ledger = ledger_of(1000)
    keys = set()
    for fraction in (0.6, 0.2):
        plan = PARADIGMS["path_switching"](
            plan_context(ledger, DecaySpec(length=FixedLength(fraction=fraction)), auto_release=False)
        )
        keys.add(plan.stages[0].key.rsplit("/", 1)[0])
        assert plan.stages[-1].kind == StageKind.GATE
    assert len(keys) == 1
