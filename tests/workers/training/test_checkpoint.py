"""Where a training stage begins: at the newest intact checkpoint of its lineage, and with what was spent on it."""

import errno
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from service.artifacts import Artifacts
from service.core.errors import ArtifactCorrupt, DiskFull, Stopped
from service.core.manifest import Manifest
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


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = other_trainer.trunk(trunk_stage(small, 12))
    publish, seen = Artifacts.publish, []

    def slow(self: Artifacts, key: str, directory: Path, result: dict[str, Any]) -> Manifest:
        before = len(trainer.points)
        deadline = time.monotonic() + 20
        on_the_way = result["step"] < 12
        while on_the_way and len(trainer.points) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append((result["step"], len(trainer.points) - before))
        return publish(self, key, directory, result)

    monkeypatch.setattr(Artifacts, "publish", slow)
    manifest = trainer.trunk(trunk_stage(small, 12, checkpoint_every=4))
    assert [step for step, _ in seen] == [4, 8, 12]
    assert all(during >= 2 for step, during in seen if step < 12)
    assert content(trainer.artifacts, manifest) == content(other_trainer.artifacts, whole)
    # What was written meanwhile is the state of its own step.
    at_4 = trainer.artifacts.manifest(trunk_key(small.line, small.ledger, 4))
    like = other_trainer.trunk(trunk_stage(SmallLine(small.line, small.ledger, small.data_keys), 4))
    assert at_4 is not None
    assert content(trainer.artifacts, at_4) == content(other_trainer.artifacts, like)


def test_a_checkpoint_that_cannot_be_written_costs_no_run(
    small: SmallLine,
    trainer: Trainer,
    other_trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish = Artifacts.publish

    def full(self: Artifacts, key: str, directory: Path, result: dict[str, Any]) -> Manifest:
        if result["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return publish(self, key, directory, result)

    monkeypatch.setattr(Artifacts, "publish", full)
    with caplog.at_level(logging.ERROR):
        manifest = trainer.trunk(trunk_stage(small, 8, checkpoint_every=3))
    assert "could not be published" in caplog.text
    keys = trainer.artifacts.keys(trunk_prefix(small.line))
    assert keys == sorted(trunk_key(small.line, small.ledger, step) for step in (6, 8))
    whole = other_trainer.trunk(trunk_stage(small, 8))
    assert content(trainer.artifacts, manifest) == content(other_trainer.artifacts, whole)


def test_a_stop_waits_for_the_checkpoint_of_its_step(
    small: SmallLine, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Artifacts.publish

    def slow(self: Artifacts, key: str, directory: Path, result: dict[str, Any]) -> Manifest:
        time.sleep(0.2)
        return publish(self, key, directory, result)

    monkeypatch.setattr(Artifacts, "publish", slow)
    trainer.stop_at = 5
    with pytest.raises(Stopped):
        trainer.trunk(trunk_stage(small, 9, checkpoint_every=4))
    keys = trainer.artifacts.keys(trunk_prefix(small.line))
    assert keys == sorted(trunk_key(small.line, small.ledger, step) for step in (4, 5))


def test_an_end_that_cannot_be_written_fails(
    small: SmallLine, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Artifacts, key: str, directory: Path, result: dict[str, Any]) -> Manifest:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Artifacts, "publish", full)
    with pytest.raises(DiskFull):
        trainer.trunk(trunk_stage(small, 4))
    assert trainer.artifacts.keys(trunk_prefix(small.line)) == []
