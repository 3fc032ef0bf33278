"""Specs reject unknown values, and fingerprints cover exactly what decides bits."""

from typing import Any

import pytest
from pydantic import ValidationError

from service.core.ledger import ledger_up_to, steps_of
from service.core.paradigm_specs import (
    AutoLength,
    BranchSpec,
    DecaySpec,
    FromScratchSpec,
    PathSwitchingSpec,
    ProportionalLength,
    WsdSSpec,
)
from service.core.paradigms import PARADIGMS
from service.core.plan import run_key, trunk_key
from service.core.specs import ModelSpec, TrainingSpec
from service.core.stage_specs import RunPath, StageKind, TrainStage
from tests.support.specs import ledger_of, line_spec, plan_context

LEDGER = ledger_of(100, 50)


def test_everything_but_name_and_dataset_has_a_default() -> None:
    spec = ModelSpec(name="m", dataset="d")
    assert ModelSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_replay_is_the_default_except_from_scratch() -> None:
    plain = {"name": "m", "dataset": "d"}
    paradigm = ModelSpec.model_validate(plain).paradigm
    assert isinstance(paradigm, PathSwitchingSpec)
    branch = paradigm.decay
    assert isinstance(branch.length, ProportionalLength)
    assert (branch.length.rule, branch.length.fraction) == ("proportional", 0.085)
    assert (branch.replay_fraction, branch.replay_budget) == (0.75, "kept")
    expected = {"path_switching": 0.15, "continual": 0.15, "wsd_s": 0.15, "merge": 0.15, "from_scratch": 0.0}
    for name, share in expected.items():
        for changes in ({}, {"training": {"seed": 7}}):
            spec = ModelSpec.model_validate(plain | {"paradigm": {"name": name}} | changes)
            assert spec.training.replay_fraction == share
            assert ModelSpec.model_validate(spec.model_dump(mode="json")) == spec
        none = ModelSpec.model_validate(
            plain | {"paradigm": {"name": name}, "training": {"replay_fraction": 0.0}}
        )
        assert none.training.replay_fraction == 0.0
    for given in (TrainingSpec(), TrainingSpec(seed=7)):
        scratch = ModelSpec(name="m", dataset="d", paradigm=FromScratchSpec(), training=given)
        assert (scratch.training.replay_fraction, scratch.training.seed) == (0.0, given.seed)
    for name in ("wsd_s", "from_scratch"):
        spec = ModelSpec.model_validate(plain | {"paradigm": {"name": name}})
        assert isinstance(spec.paradigm, WsdSSpec | FromScratchSpec)
        assert spec.paradigm.decay == DecaySpec()


def test_the_rule_auto_replays_only_on_request() -> None:
    for length in ({"rule": "auto"}, AutoLength()):
        assert BranchSpec.model_validate({"length": length}).replay_fraction == 0.0
        assert BranchSpec.model_validate({"length": length, "replay_fraction": 0.5}).replay_fraction == 0.5
    assert BranchSpec.model_validate({"length": {"rule": "fixed"}}).replay_fraction == 0.75


def test_the_budget_is_irrelevant_without_replay() -> None:
    keys = set()
    for budget in ("grown", "kept"):
        paradigm = PathSwitchingSpec(decay=BranchSpec(replay_budget=budget))
        plan = PARADIGMS["path_switching"](plan_context(ledger_of(100), paradigm))
        keys.add(next(stage.key for stage in plan.stages if stage.kind == StageKind.TRAIN_BRANCH))
    assert len(keys) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "UPPER"},
        {"colour": "red"},
        {"architecture": {"preset": "tiny", "base": "x"}},
        {"architecture": {}},
        {"architecture": {"base": "b"}, "tokenizer": {"path": "t"}},
        {"tokenizer": {}},
        {"training": {"batch_tokens": 64, "sequence_length": 128}},
        {"training": {"workers": 17}},
        {"training": {"peak_lr": float("nan")}},
        {"gate": {"max_backward_transfer": float("inf")}},
        {"paradigm": {"name": "nonsense"}},
        {"paradigm": {"name": "from_scratch"}, "training": {"replay_fraction": 0.15}},
        {"paradigm": {"name": "path_switching", "decay": {"shape": "inverse"}}},
        {"paradigm": {"name": "path_switching", "decay": {"shape": "multi_step"}}},
        {"paradigm": {"name": "path_switching", "decay": {"shape": "multi_step", "cuts": [0.8, 0.4]}}},
        {"paradigm": {"name": "path_switching", "decay": {"cuts": [0.2, 0.4]}}},
        {
            "paradigm": {
                "name": "path_switching",
                "decay": {"length": {"rule": "proportional", "min": 2, "max": 1}},
            }
        },
        {"paradigm": {"name": "path_switching", "decay": {"replay_fraction": 1.0}}},
    ],
)
def test_invalid_values_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ModelSpec.model_validate({"name": "m", "dataset": "d"} | wrong)


def test_a_pass_takes_at_least_one_step_and_fills_its_last_batch() -> None:
    assert [steps_of(rows, 16, 1) for rows in (1, 16, 17)] == [1, 1, 2]
    assert steps_of(17, 16, 3) == 6


def test_the_ledger_up_to_a_step_stops_at_the_version_the_step_lies_in() -> None:
    assert [entry.number for entry in ledger_up_to(LEDGER, 100)] == [1]
    assert [entry.number for entry in ledger_up_to(LEDGER, 101)] == [1, 2]
    assert ledger_up_to(LEDGER, 0) == ()
    with pytest.raises(ValueError, match="past the end"):
        ledger_up_to(LEDGER, 151)


def test_a_trunk_key_does_not_depend_on_what_arrives_later() -> None:
    line = line_spec()
    assert trunk_key(line, LEDGER[:1], 80) == trunk_key(line, LEDGER, 80)
    assert trunk_key(line, LEDGER, 120) != trunk_key(line, ledger_of(100, 60), 120)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"peak_lr": 1e-3}, {"batch_rows": 8}, {"tokenizer_key": "tokenizer/u"}]
)
def test_a_trunk_key_depends_on_what_decides_its_bits(change: dict[str, Any]) -> None:
    assert trunk_key(line_spec(**change), LEDGER, 80) != trunk_key(line_spec(), LEDGER, 80)


def test_the_checkpoint_interval_does_not_change_a_branchs_key() -> None:
    def key(**changes: Any) -> Any:
        path = RunPath(decay_steps=10, stream_steps=10)
        values = {
            "from_step": 90,
            "to_step": 100,
            "start_key": "trunk/a",
            "path": path,
            "checkpoint_every": 5,
        }
        stage = TrainStage(line=line_spec(), ledger=LEDGER[:1], **(values | changes))
        return run_key(StageKind.TRAIN_BRANCH, stage)

    assert key(checkpoint_every=7) == key()
    assert key(start_key="trunk/b") != key()


def test_the_number_of_workers_is_not_part_of_a_line() -> None:
    assert "workers" not in line_spec().model_dump()
    assert TrainingSpec(workers=2).batch_rows == TrainingSpec(workers=1).batch_rows


def test_decay_defaults_are_the_documented_ones() -> None:
    decay = DecaySpec()
    assert isinstance(decay.length, ProportionalLength)
    assert (decay.shape, decay.floor, decay.length.rule, decay.length.fraction) == (
        "1-sqrt",
        0.0,
        "proportional",
        0.1,
    )
