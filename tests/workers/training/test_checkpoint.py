"""Where a training stage begins: at the newest intact checkpoint of its lineage, and with what was spent on it."""

import json
import logging

import pytest

from service.core.errors import ArtifactCorrupt, Stopped
from service.core.plan import trunk_key, trunk_prefix
from tests.support.training import SmallLine, Trainer, branch_stage, content, trunk_stage


def test_checkpoints_on_the_way_change_nothing(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer
) -> None:
    whole = trainer.trunk(trunk_stage(small, 8))
    often = other_trainer.trunk(trunk_stage(small, 8, checkpoint_every=3))
    assert content(other_trainer.artifacts, often) == content(trainer.artifacts, whole)
    keys = other_trainer.artifacts.keys(trunk_prefix(small.line))
    assert keys == sorted(trunk_key(small.line, small.ledger, step) for step in (3, 6, 8))


def test_a_trunk_goes_on_from_the_newest_checkpoint_of_its_lineage(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer
) -> None:
    """A segment, and a longer one that begins where that ended, as if it were one."""
    trainer.trunk(trunk_stage(small, 6))
    first = len(trainer.points)
    longer = trainer.trunk(trunk_stage(small, 10))
    assert longer.result["resumed_from_step"] == 6
    assert len(trainer.points) - first == 4
    other_trainer.trunk(trunk_stage(small, 10))
    assert [p.loss for p in trainer.points] == [p.loss for p in other_trainer.points]
    # The artifact has every point of its stage, those of the other segment included.
    assert json.loads(content(trainer.artifacts, longer)["points"])[0]["step"] == 1


def test_a_trunk_that_read_other_data_is_not_gone_on_from(small: SmallLine, trainer: Trainer) -> None:
    trainer.trunk(trunk_stage(small, 4))
    swapped = SmallLine(small.line, small.ledger[::-1], small.data_keys)
    assert trainer.trunk(trunk_stage(swapped, 6)).result["resumed_from_step"] == 0


def test_a_corrupt_newest_checkpoint_costs_steps_not_the_stage(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.trunk(trunk_stage(small, 6, checkpoint_every=3))
    newest = trainer.artifacts.open(trunk_key(small.line, small.ledger, 6)) / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x7f")
    with caplog.at_level(logging.WARNING):
        manifest = trainer.trunk(trunk_stage(small, 9))
    assert "passed over" in caplog.text
    assert manifest.result["resumed_from_step"] == 3
    whole = other_trainer.trunk(trunk_stage(small, 9))
    assert content(trainer.artifacts, manifest) == content(other_trainer.artifacts, whole)


def test_a_trunk_whose_start_is_corrupt_goes_back_behind_it(small: SmallLine, trainer: Trainer) -> None:
    """The steps before its own are trained again, and none of them is told as its own."""
    trainer.trunk(trunk_stage(small, 3))
    start = trainer.artifacts.open(trainer.trunk(trunk_stage(small, 6)).key)
    (start / "state.json").write_text('{"step": 7}')
    trainer.points.clear()
    manifest = trainer.trunk(trunk_stage(small, 8, from_step=6))
    assert manifest.result["resumed_from_step"] == 3
    assert [point.stage_step for point in trainer.points] == [1, 2]
    assert [row["step"] for row in json.loads(content(trainer.artifacts, manifest)["points"])] == [7, 8]


def test_a_branch_cannot_begin_at_a_corrupt_checkpoint(small: SmallLine, trainer: Trainer) -> None:
    start = trainer.artifacts.open(trainer.trunk(trunk_stage(small, 9)).key)
    (start / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactCorrupt):
        trainer.branch(branch_stage(small, 9, 6))


def test_what_earlier_attempts_trained_is_carried_and_what_others_trained_is_not(
    small: SmallLine, trainer: Trainer
) -> None:
    per_step = 8 * 32
    trainer.trunk(trunk_stage(small, 6))
    stage = trunk_stage(small, 12, from_step=3)  # goes on from step 6, which another stage has trained
    trainer.stop_at = 10
    with pytest.raises(Stopped):
        trainer.trunk(stage)
    stopped = trainer.artifacts.manifest(trunk_key(small.line, small.ledger, 10))
    assert stopped is not None
    trainer.stop_at = None
    result = trainer.trunk(stage).result
    assert (result["from_step"], result["resumed_from_step"], result["step"]) == (3, 10, 12)
    assert result["tokens"] == 9 * per_step
    assert stopped.result["trained_tokens"] == 4 * per_step
    assert result["trained_tokens"] == 6 * per_step
    assert result["carried_device_seconds"] == stopped.result["device_seconds"] < result["device_seconds"]
