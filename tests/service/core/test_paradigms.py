"""Plans of every paradigm: golden files, the cost of N versions stage by stage, and its own rules."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from service.core.costs import continual, from_scratch, path_switching
from service.core.errors import StageInputInvalid
from service.core.ledger import own_steps, total_steps
from service.core.paradigm_specs import (
    BranchSpec,
    ContinualSpec,
    DecaySpec,
    FixedLength,
    FromScratchSpec,
    MergeSpec,
    ParadigmSpec,
    PathSwitchingSpec,
    WsdSSpec,
)
from service.core.paradigms import PARADIGMS
from service.core.paradigms.merge import merge_points
from service.core.plan import LineEnd
from service.core.specs import ModelSpec
from service.core.stage_specs import TRAINING_KINDS, MergeStage, StageKind, TrainStage
from tests.support.specs import ledger_of, line_spec, plan_context

GOLDEN = Path(__file__).parents[2] / "golden"

HALF_REPLAYED = DecaySpec(length=FixedLength(fraction=0.6), replay_fraction=0.25)
ALL: dict[str, ParadigmSpec] = {
    "path_switching": PathSwitchingSpec(decay=BranchSpec(**HALF_REPLAYED.model_dump())),
    "from_scratch": FromScratchSpec(schedule="wsd"),
    "continual": ContinualSpec(restart="rewarm", optimizer_state="reset"),
    "wsd_s": WsdSSpec(decay=HALF_REPLAYED),
    "merge": MergeSpec(k=3),
}
# A line of 64 versions takes 64 plans, which may exceed the default deadline of 200 ms.
BY_EXAMPLE = settings(max_examples=30)
BATCHES = st.lists(st.integers(1, 900), min_size=1, max_size=64)


def make_line(paradigm: Any, batches: Any, *, replay: float = 0.0, **line: Any) -> Any:
    """The training stages of every version of a line in turn, each plan starting where the last one ended."""
    trunk_step, previous, versions = 0, None, []
    for count in range(1, len(batches) + 1):
        context = plan_context(
            ledger_of(*batches[:count], replay=replay),
            paradigm,
            trunk_step=trunk_step,
            previous=previous,
            line=line_spec(**line),
        )
        plan = PARADIGMS[paradigm.name](context)
        trained = [TrainStage.model_validate(s.spec) for s in plan.stages if s.kind in TRAINING_KINDS]
        ends = [
            s.to_step for s, p in zip(trained, plan.stages, strict=False) if p.kind == StageKind.TRAIN_TRUNK
        ]
        trunk_step = max([trunk_step, *ends])
        exported = next(s for s in plan.stages if s.kind == StageKind.EXPORT)
        previous = LineEnd(checkpoint_key=exported.spec["checkpoint_key"], data_version=count)
        versions.append(trained)
    return versions


def steps_trained(versions: Any) -> Any:
    return sum(stage.total_steps for trained in versions for stage in trained)


@pytest.mark.parametrize("name", PARADIGMS)
def test_the_plan_equals_the_golden_plan(name: Any) -> None:
    context = plan_context(
        ledger_of(100, 80),
        ALL[name],
        trunk_step={"path_switching": 40, "merge": 100}.get(name, 0),
        previous=LineEnd(checkpoint_key="train/t1", data_version=1),
        served_number=1,
        served_export_key="export/e1",
    )
    golden = GOLDEN / f"plan_{name}.json"
    assert PARADIGMS[name](context).model_dump(mode="json") == json.loads(golden.read_text()), (
        f"if the change is meant, write the new plan to {golden.name}"
    )


@BY_EXAMPLE
@given(BATCHES)
def test_from_scratch_costs_the_sum_of_all_ends(batches: Any) -> None:
    ends = [sum(batches[:n]) for n in range(1, len(batches) + 1)]
    for schedule in ("cosine", "wsd"):
        assert steps_trained(make_line(FromScratchSpec(schedule=schedule), batches)) == from_scratch(ends)


@BY_EXAMPLE
@given(BATCHES, st.sampled_from([0.0, 0.15, 0.5]))
def test_continual_costs_every_step_of_the_stream_once(batches: Any, replay: Any) -> None:
    end = total_steps(ledger_of(*batches, replay=replay))
    for restart in ("reset", "rewarm", "low"):
        paradigm = ContinualSpec(restart=restart)
        assert steps_trained(make_line(paradigm, batches, replay=replay)) == continual([end])


@BY_EXAMPLE
@given(BATCHES, st.sampled_from([0.0, 0.15, 0.5]), st.sampled_from(["1-sqrt", "mean"]))
def test_merging_costs_every_step_of_the_stream_once(batches: Any, replay: Any, weights: Any) -> None:
    end = total_steps(ledger_of(*batches, replay=replay))
    assert steps_trained(make_line(MergeSpec(weights=weights), batches, replay=replay)) == continual([end])


@BY_EXAMPLE
@given(BATCHES, st.sampled_from([0.0, 0.5]))
def test_wsd_s_costs_the_stream_once_plus_replay_in_its_decays(batches: Any, replay: Any) -> None:
    ledger = ledger_of(*batches, replay=replay)
    assert steps_trained(make_line(WsdSSpec(), batches, replay=replay)) == total_steps(ledger)
    grown = WsdSSpec(decay=DecaySpec(replay_fraction=0.5))
    versions = make_line(grown, batches, replay=replay)
    more = sum(trained[-1].path.steps - trained[-1].path.stream_steps for trained in versions)
    assert steps_trained(versions) == total_steps(ledger) + more


@BY_EXAMPLE
@given(BATCHES, st.sampled_from([0.1, 0.6]), st.sampled_from([0.0, 0.25]), st.sampled_from(["grown", "kept"]))
def test_path_switching_costs_the_stream_once_plus_earlier_branches_plus_replay(
    batches: Any, fraction: Any, in_branch: Any, budget: Any
) -> None:
    decay = BranchSpec(length=FixedLength(fraction=fraction), replay_fraction=in_branch, replay_budget=budget)
    versions = make_line(PathSwitchingSpec(decay=decay), batches)
    branches = [trained[-1] for trained in versions]
    ends = [sum(batches[:n]) for n in range(1, len(batches) + 1)]
    last = branches[-1].path
    assert steps_trained(versions) == (
        path_switching(ends, [branch.total_steps for branch in branches]) + last.steps - last.stream_steps
    )


@BY_EXAMPLE
@given(BATCHES, st.integers(1, 3))
def test_the_cost_of_from_scratch_excludes_replay(batches: Any, epochs: Any) -> None:
    line = line_spec(epochs=epochs)
    ledger = ledger_of(*batches, epochs=epochs, replay=0.5)
    assert own_steps(line, ledger) == epochs * sum(batches)


@pytest.mark.parametrize("restart", ["reset", "rewarm", "low"])
def test_continual_continues_from_the_previous_version(restart: str) -> None:
    first, second = make_line(ContinualSpec(restart=restart, floor=0.2), [100, 80])
    assert (first[0].from_step, first[0].to_step, first[0].start_key) == (0, 100, None)
    assert (second[0].from_step, second[0].to_step) == (100, 180)
    assert second[0].start_key is not None
    assert first[0].path.resumable
    assert (first[0].path.warmup_steps, first[0].path.warmup_from) == (10, 0.0)
    path = second[0].path
    shape = (path.warmup_steps, path.warmup_from, path.hold_steps, path.level, path.decay_steps)
    assert (
        shape
        == {
            "reset": (0, 0.2, 0, 1.0, 80),
            "rewarm": (8, 0.2, 0, 1.0, 72),
            "low": (0, 0.0, 80, 0.2, 0),
        }[restart]
    )


def test_a_data_version_without_an_update_is_read_by_the_next_update() -> None:
    context = plan_context(
        ledger_of(100, 80, 60), ContinualSpec(), previous=LineEnd(checkpoint_key="train/t1", data_version=1)
    )
    stage = TrainStage.model_validate(PARADIGMS["continual"](context).stages[0].spec)
    assert (stage.from_step, stage.to_step) == (100, 240)


@pytest.mark.parametrize("paradigm", [ContinualSpec(), WsdSSpec(), MergeSpec()])
def test_a_ledger_without_unread_data_has_no_plan(paradigm: Any) -> None:
    context = plan_context(
        ledger_of(100),
        paradigm,
        trunk_step=100,
        previous=LineEnd(checkpoint_key="train/t1", data_version=1),
    )
    with pytest.raises(StageInputInvalid, match="past the last step 100"):
        PARADIGMS[paradigm.name](context)


@pytest.mark.parametrize(
    "paradigm", [ContinualSpec(), WsdSSpec(), WsdSSpec(decay=DecaySpec(length=FixedLength(fraction=1.0)))]
)
def test_continuing_without_optimizer_state_starts_a_fresh_optimizer(paradigm: Any) -> None:
    """A one-off on a path-switching line does this, because a branch ends without optimizer state."""
    end = LineEnd(checkpoint_key="branch/b1", data_version=1, resumable=False)
    plan = PARADIGMS[paradigm.name](plan_context(ledger_of(100, 80), paradigm, previous=end))
    trained = [TrainStage.model_validate(s.spec) for s in plan.stages if s.kind in TRAINING_KINDS]
    assert trained[0].start_key == "branch/b1"
    assert [stage.path.fresh_optimizer for stage in trained] == [True] + [False] * (len(trained) - 1)


def test_from_scratch_always_starts_from_initial_weights() -> None:
    context = plan_context(
        ledger_of(100), FromScratchSpec(), previous=LineEnd(checkpoint_key="train/t1", data_version=1)
    )
    stage = TrainStage.model_validate(PARADIGMS["from_scratch"](context).stages[0].spec)
    assert (stage.from_step, stage.to_step, stage.start_key) == (0, 100, None)


def test_wsd_s_continues_at_the_peak_from_the_decayed_weights() -> None:
    first, second = make_line(WsdSSpec(), [100, 80])
    assert [(s.from_step, s.to_step) for s in first] == [(0, 90), (90, 100)]
    assert [(s.from_step, s.to_step) for s in second] == [(100, 162), (162, 180)]
    stable, decay = second
    assert (stable.path.warmup_steps, stable.path.hold_steps, stable.path.level) == (0, 62, 1.0)
    assert decay.start_key.startswith("train/")
    assert decay.path.resumable


def test_merge_points_are_spread_evenly_over_the_span() -> None:
    points, weights = merge_points(100, 40, 4, "1-sqrt")
    assert points == (60, 70, 80, 90, 100)
    assert sum(weights) == pytest.approx(1)
    assert weights[0] == pytest.approx(math.sqrt(1 / 5))
    assert weights[-1] == pytest.approx(1 - math.sqrt(4 / 5))
    assert merge_points(100, 40, 4, "mean") == ((70, 80, 90, 100), (0.25,) * 4)


@given(st.integers(1, 500), st.integers(1, 64), st.integers(0, 400))
def test_merge_weights_scale_the_updates_as_a_decay_would(span: Any, k: Any, before: Any) -> None:
    points, weights = merge_points(before + span, span, k, "1-sqrt")
    intervals = len(points) - 1
    assert intervals == min(k, span)
    assert (points[0], points[-1]) == (before, before + span)
    assert all(a < b for a, b in itertools.pairwise(points))
    # Σ_(i ≥ j) c_i scales the weight update between checkpoints j-1 and j.
    for j in range(1, intervals + 1):
        assert sum(weights[j:]) == pytest.approx(1 - math.sqrt(j / (intervals + 1)))


def test_a_merge_uses_trunk_checkpoints_from_the_current_step_on() -> None:
    context = plan_context(ledger_of(100, 10), MergeSpec(k=2, span=FixedLength(fraction=1.0)), trunk_step=104)
    plan = PARADIGMS["merge"](context)
    assert [stage.name for stage in plan.stages] == [
        *("trunk-1", "trunk-2", "merge", "export", "evaluate", "gate", "release")
    ]
    merged = MergeStage.model_validate(plan.stages[2].spec)
    assert [key.split("/")[2].split("-")[0] for key in merged.checkpoint_keys] == [
        *("000000104", "000000107", "000000110")
    ]
    assert plan.notes == {"merged_steps": [104, 107, 110], "branch_held": None, "branch_clamped": True}


@pytest.mark.parametrize(
    "wrong",
    [
        {"paradigm": {"name": "from_scratch"}, "training": {"replay_fraction": 0.5}},
        {"paradigm": {"name": "from_scratch", "decay": {"replay_fraction": 0.5}}},
        {"paradigm": {"name": "continual", "restart": "low", "floor": 0}},
        {"paradigm": {"name": "wsd_s", "decay": {"replay_fraction": 0.5, "replay_budget": "kept"}}},
        {"paradigm": {"name": "merge", "decay": {}}},
        {"paradigm": {"name": "unheard_of"}},
    ],
)
def test_settings_that_a_paradigm_cannot_honour_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ModelSpec.model_validate({"name": "m", "dataset": "d", **wrong})


@pytest.mark.parametrize("name", PARADIGMS)
def test_a_paradigm_needs_only_its_name(name: Any) -> None:
    spec = ModelSpec.model_validate({"name": "m", "dataset": "d", "paradigm": {"name": name}})
    assert ModelSpec.model_validate(spec.model_dump(mode="json")) == spec
