"""A training stage resumes from the newest intact checkpoint of its lineage, and adds up what was spent on it."""

import errno
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from service.artifacts import Artifacts
from service.core.artifact_files import WEIGHTS
from service.core.errors import ArtifactCorrupt, DiskFull, Stopped
from service.core.manifest import Manifest
from service.core.plan import trunk_key, trunk_prefix
from tests.support.training import SmallLine, Trainer, branch_stage, content, trunk_stage
from workers.training.checkpoint import OPTIMIZER, STATE


def test_periodic_checkpoints_do_not_change_the_result(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer
) -> None:
    without = trainer.trunk(trunk_stage(small, 8))
    with_checkpoints = other_trainer.trunk(trunk_stage(small, 8, checkpoint_every=3))
    assert content(other_trainer.artifacts, with_checkpoints) == content(trainer.artifacts, without)
    keys = other_trainer.artifacts.keys(trunk_prefix(small.line))
    assert keys == sorted(trunk_key(small.line, small.ledger, step) for step in (3, 6, 8))


def test_a_trunk_resumes_from_the_newest_checkpoint_of_its_lineage(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer
) -> None:
    """Two segments give the same result as a single run."""
    trainer.trunk(trunk_stage(small, 6))
    num_first_points = len(trainer.points)
    longer = trainer.trunk(trunk_stage(small, 10))
    assert longer.result["resumed_from_step"] == 6
    assert len(trainer.points) - num_first_points == 4
    other_trainer.trunk(trunk_stage(small, 10))
    assert [p.loss for p in trainer.points] == [p.loss for p in other_trainer.points]
    # The artifact has all points of its stage, including those of the first segment.
    assert json.loads(content(trainer.artifacts, longer)["points"])[0]["step"] == 1


def test_a_trunk_does_not_resume_from_a_checkpoint_with_other_data(
    small: SmallLine, trainer: Trainer
) -> None:
    trainer.trunk(trunk_stage(small, 4))
    swapped = SmallLine(small.line, small.ledger[::-1], small.data_keys)
    assert trainer.trunk(trunk_stage(swapped, 6)).result["resumed_from_step"] == 0


def test_a_corrupt_newest_checkpoint_costs_steps_not_the_stage(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.trunk(trunk_stage(small, 6, checkpoint_every=3))
    newest = trainer.artifacts.open(trunk_key(small.line, small.ledger, 6)) / WEIGHTS
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x7f")
    with caplog.at_level(logging.WARNING):
        manifest = trainer.trunk(trunk_stage(small, 9))
    assert "skipped a damaged checkpoint" in caplog.text
    assert manifest.result["resumed_from_step"] == 3
    undamaged = other_trainer.trunk(trunk_stage(small, 9))
    assert content(trainer.artifacts, manifest) == content(other_trainer.artifacts, undamaged)


def test_a_trunk_with_a_corrupt_start_repeats_earlier_steps_without_reporting_them(
    small: SmallLine, trainer: Trainer
) -> None:
    trainer.trunk(trunk_stage(small, 3))
    start = trainer.artifacts.open(trainer.trunk(trunk_stage(small, 6)).key)
    (start / STATE).write_text('{"step": 7}')
    trainer.points.clear()
    manifest = trainer.trunk(trunk_stage(small, 8, from_step=6))
    assert manifest.result["resumed_from_step"] == 3
    assert [point.stage_step for point in trainer.points] == [1, 2]
    assert [row["step"] for row in json.loads(content(trainer.artifacts, manifest)["points"])] == [7, 8]


def test_a_branch_cannot_start_from_a_corrupt_checkpoint(small: SmallLine, trainer: Trainer) -> None:
    start = trainer.artifacts.open(trainer.trunk(trunk_stage(small, 9)).key)
    (start / OPTIMIZER).write_bytes(b"")
    with pytest.raises(ArtifactCorrupt):
        trainer.branch(branch_stage(small, 9, 6))


def test_a_stage_counts_the_steps_of_its_own_earlier_attempts_only(
    small: SmallLine, trainer: Trainer
) -> None:
    step_tokens = 8 * 32
    trainer.trunk(trunk_stage(small, 6))
    stage = trunk_stage(small, 12, from_step=3)  # resumes at step 6, which another stage trained
    trainer.stop_at = 10
    with pytest.raises(Stopped):
        trainer.trunk(stage)
    stopped = trainer.artifacts.manifest(trunk_key(small.line, small.ledger, 10))
    assert stopped is not None
    trainer.stop_at = None
    result = trainer.trunk(stage).result
    assert (result["from_step"], result["resumed_from_step"], result["step"]) == (3, 10, 12)
    assert result["tokens"] == 9 * step_tokens
    assert stopped.result["trained_tokens"] == 4 * step_tokens
    assert result["trained_tokens"] == 6 * step_tokens
    assert result["carried_device_seconds"] == stopped.result["device_seconds"] < result["device_seconds"]


@pytest.mark.slow
def test_training_continues_while_a_checkpoint_is_written(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = other_trainer.trunk(trunk_stage(small, 12))
    publish, published = Artifacts.publish, []

    def publish_slowly(self: Artifacts, key: str, directory: Path, result: dict[str, Any]) -> Manifest:
        num_before = len(trainer.points)
        deadline = time.monotonic() + 20
        is_periodic = result["step"] < 12
        while is_periodic and len(trainer.points) < num_before + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        published.append((result["step"], len(trainer.points) - num_before))
        return publish(self, key, directory, result)

    monkeypatch.setattr(Artifacts, "publish", publish_slowly)
    manifest = trainer.trunk(trunk_stage(small, 12, checkpoint_every=4))
    assert [step for step, _ in published] == [4, 8, 12]
    assert all(steps_meanwhile >= 2 for step, steps_meanwhile in published if step < 12)
    assert content(trainer.artifacts, manifest) == content(other_trainer.artifacts, undisturbed)
    # The checkpoint holds the state of its own step, not of the later ones.
    at_4 = trainer.artifacts.manifest(trunk_key(small.line, small.ledger, 4))
    expected = other_trainer.trunk(trunk_stage(SmallLine(small.line, small.ledger, small.data_keys), 4))
    assert at_4 is not None
    assert content(trainer.artifacts, at_4) == content(other_trainer.artifacts, expected)


def test_a_run_survives_a_periodic_checkpoint_that_cannot_be_written(
    small: SmallLine,
    trainer: Trainer,
    other_trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish = Artifacts.publish

    def fail_at_3(self: Artifacts, key: str, directory: Path, result: dict[str, Any]) -> Manifest:
        if result["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return publish(self, key, directory, result)

    monkeypatch.setattr(Artifacts, "publish", fail_at_3)
    with caplog.at_level(logging.ERROR):
        manifest = trainer.trunk(trunk_stage(small, 8, checkpoint_every=3))
    assert "could not be published" in caplog.text
    keys = trainer.artifacts.keys(trunk_prefix(small.line))
    assert keys == sorted(trunk_key(small.line, small.ledger, step) for step in (6, 8))
    undisturbed = other_trainer.trunk(trunk_stage(small, 8))
    assert content(trainer.artifacts, manifest) == content(other_trainer.artifacts, undisturbed)


def test_a_stopped_run_publishes_the_checkpoint_of_its_last_step(
    small: SmallLine, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Artifacts.publish

    def publish_slowly(self: Artifacts, key: str, directory: Path, result: dict[str, Any]) -> Manifest:
        time.sleep(0.2)
        return publish(self, key, directory, result)

    monkeypatch.setattr(Artifacts, "publish", publish_slowly)
    trainer.stop_at = 5
    with pytest.raises(Stopped):
        trainer.trunk(trunk_stage(small, 9, checkpoint_every=4))
    keys = trainer.artifacts.keys(trunk_prefix(small.line))
    assert keys == sorted(trunk_key(small.line, small.ledger, step) for step in (4, 5))


def test_a_run_whose_last_checkpoint_cannot_be_written_fails(
    small: SmallLine, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Artifacts, key: str, directory: Path, result: dict[str, Any]) -> Manifest:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Artifacts, "publish", fail)
    with pytest.raises(DiskFull):
        trainer.trunk(trunk_stage(small, 4))
    assert trainer.artifacts.keys(trunk_prefix(small.line)) == []
