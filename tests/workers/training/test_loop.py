"""Real training gives the same bits twice, across interruptions, and from trunk to branch."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.core.errors import Diverged, StageInputInvalid, Stopped
from service.core.manifest import Manifest
from service.core.plan import own_checkpoint_key, own_checkpoint_prefix, trunk_key, trunk_prefix
from service.core.schedules import run_rate, trunk_rate
from service.core.specs import ArchitectureSpec
from service.core.stage_specs import TrainStage
from tests.support.training import (
    SMALL_CONFIG,
    STATE_FILES,
    SmallLine,
    Trainer,
    branch_stage,
    content,
    trunk_stage,
)


def interrupted(trainer: Trainer, stage: TrainStage, at: list[int]) -> Manifest:
    """Run the stage, stopping and restarting it at each of these steps."""
    run = trainer.trunk if stage.path is None else trainer.branch
    for step in at:
        trainer.stop_at = step
        with pytest.raises(Stopped, match=f"stopped at step {step} "):
            run(stage)
    trainer.stop_at = None
    return run(stage)


def test_two_equal_runs_give_equal_bits(small: SmallLine, trainer: Trainer, other_trainer: Trainer) -> None:
    stage = trunk_stage(small, 8)
    once = content(trainer.artifacts, trainer.trunk(stage))
    assert once == content(other_trainer.artifacts, other_trainer.trunk(stage))
    assert set(once) == {*STATE_FILES, "points"}


def test_an_interrupted_trunk_ends_in_the_same_bits(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer
) -> None:
    """Stops at the first step, twice in a row, and in the second data version."""
    stage = trunk_stage(small, 20)
    whole = content(trainer.artifacts, trainer.trunk(stage))
    manifest = interrupted(other_trainer, stage, [1, 2, 9, 16])
    assert content(other_trainer.artifacts, manifest) == whole
    assert manifest.result["resumed_from_step"] == 16
    assert [point.step for point in other_trainer.points] == list(range(1, 21))


def test_a_stage_without_steps_publishes_the_initial_state(small: SmallLine, trainer: Trainer) -> None:
    manifest = trainer.trunk(trunk_stage(small, 0))
    assert (manifest.result["step"], manifest.result["tokens"], manifest.result["loss"]) == (0, 0, None)
    branch = trainer.branch(branch_stage(small, 0, 4))
    assert branch.result["step"] == 4


def test_a_branch_starts_with_the_trunks_loss_and_does_not_change_its_checkpoint(
    small: SmallLine, trainer: Trainer
) -> None:
    start = trainer.trunk(trunk_stage(small, 9))
    folder = trainer.artifacts.open(start.key)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    branch = trainer.branch(branch_stage(small, 9, 6))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    trainer.points.clear()
    trainer.trunk(trunk_stage(small, 15))
    trunk_losses = [point.loss for point in trainer.points]
    assert branch.result["first_loss"] == trunk_losses[0]
    # The branch reads the same rows at another rate, so the losses differ after the first step.
    assert branch.result["loss"] != trunk_losses[-1]
    names = {entry.path for entry in branch.files}
    assert names == {"config.json", "model.safetensors", "state.json", "metrics.jsonl"}


def test_an_interrupted_branch_ends_in_the_same_bits(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer
) -> None:
    """With replay, another beta2, and its own checkpoints, which its trunk does not use."""
    stage = branch_stage(small, 20, 12, stream_steps=6, replay_fraction=0.5, beta2=0.99, checkpoint_every=5)
    for each in (trainer, other_trainer):
        each.trunk(trunk_stage(small, 20))
    whole = trainer.branch(stage)
    again = interrupted(other_trainer, stage, [21, 27])
    assert content(trainer.artifacts, whole) == content(other_trainer.artifacts, again)
    assert other_trainer.artifacts.keys(own_checkpoint_prefix(stage)) == [
        own_checkpoint_key(stage, step) for step in (21, 25, 27, 30)
    ]
    assert other_trainer.artifacts.keys(trunk_prefix(small.line)) == [trunk_key(small.line, small.ledger, 20)]


def test_schedules_reach_the_optimizer(small: SmallLine, trainer: Trainer) -> None:
    """Checks the reported rates, and the size of the updates that they cause."""
    trainer.trunk(trunk_stage(small, 9))
    peak = small.line.peak_lr
    assert [p.learning_rate for p in trainer.points] == [trunk_rate(step, peak, 2) for step in range(1, 10)]
    trainer.points.clear()
    stage = branch_stage(small, 9, 6, shape="multi_step", cuts=(0.3, 0.6), checkpoint_every=1)
    trainer.branch(stage)
    assert stage.path is not None
    rates = [run_rate(k, stage.path, peak) for k in range(1, 7)]
    assert [p.learning_rate for p in trainer.points] == rates
    weights = [trainer.artifacts.open(trunk_key(small.line, small.ledger, 9))]
    weights += [trainer.artifacts.open(own_checkpoint_key(stage, step)) for step in range(10, 15)]
    tables = [load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in weights]
    moved = [(after - before).abs().mean().item() for before, after in pairwise(tables)]
    # The size of an Adam step is about its learning rate, apart from changes of the gradients.
    for sizes, factors in zip(pairwise(moved), pairwise(rates), strict=False):
        assert sizes[1] / sizes[0] == pytest.approx(factors[1] / factors[0], rel=0.3)


def test_points_and_result_describe_the_run(small: SmallLine, trainer: Trainer) -> None:
    trainer.trunk(trunk_stage(small, 5))
    manifest = trainer.trunk(trunk_stage(small, 9, from_step=5))
    points = trainer.points[5:]
    assert [(p.step, p.stage_step, p.total_steps) for p in points] == [(s, s - 5, 4) for s in range(6, 10)]
    assert all(p.tokens_per_second > 0 and p.grad_norm > 0 and p.stage_id == "stage" for p in points)
    assert points[-1].eta_seconds == 0
    result = manifest.result
    assert (result["from_step"], result["resumed_from_step"], result["step"]) == (5, 5, 9)
    assert result["tokens"] == 4 * 8 * 32
    assert (result["first_loss"], result["loss"]) == (points[0].loss, points[-1].loss)
    parameters = result["parameters"]
    assert parameters["total"] == parameters["non_embedding"] + parameters["embedding"]
    per_token = 6 * parameters["total"] + 6 * 2 * 32 * 32
    assert result["flops"] == per_token * result["tokens"]
    assert result["devices"] == 1
    assert 0 < result["device_seconds"] < 60
    assert json.loads(json.dumps(result)) == result


def test_a_published_stage_is_not_trained_again(small: SmallLine, trainer: Trainer) -> None:
    manifest = trainer.trunk(trunk_stage(small, 5))
    trainer.points.clear()
    assert trainer.trunk(trunk_stage(small, 5)) == manifest
    assert trainer.points == []


def test_a_loss_that_is_not_finite_publishes_nothing(small: SmallLine, trainer: Trainer) -> None:
    """A NaN weight is detected before the optimizer step."""
    key = trunk_key(small.line, small.ledger, 4)
    source = trainer.artifacts.open(trainer.trunk(trunk_stage(small, 3)).key)
    with trainer.artifacts.writing(key) as directory:
        for path in source.iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
        weights = load_file(directory / "model.safetensors")
        weights["model.norm.weight"][0] = math.nan
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "state.json").write_text('{"step": 4}')
        trainer.artifacts.publish(key, directory, {})
    before = trainer.artifacts.keys(trunk_prefix(small.line))
    with pytest.raises(Diverged, match="step 5: loss nan"):
        trainer.trunk(trunk_stage(small, 6, checkpoint_every=1))
    assert trainer.artifacts.keys(trunk_prefix(small.line)) == before


def test_a_model_whose_first_loss_is_nan_diverges(small: SmallLine, trainer: Trainer) -> None:
    architecture = ArchitectureSpec(config=SMALL_CONFIG | {"rms_norm_eps": -1.0})
    line = small.line.model_copy(update={"architecture": architecture})
    stage = trunk_stage(SmallLine(line, small.ledger, small.data_keys), 10)
    with pytest.raises(Diverged):
        trainer.trunk(stage)
    assert trainer.artifacts.keys(trunk_prefix(line)) == []


def test_dropout_is_seeded_by_the_step(small: SmallLine, trainer: Trainer, other_trainer: Trainer) -> None:
    """A line with dropout resumes to the same bits, and the process's own generator is not touched."""
    architecture = ArchitectureSpec(config=SMALL_CONFIG | {"attention_dropout": 0.2})
    line = small.line.model_copy(update={"architecture": architecture})
    stage = trunk_stage(SmallLine(line, small.ledger, small.data_keys), 6)
    torch.manual_seed(1)
    whole = content(trainer.artifacts, trainer.trunk(stage))
    numbers = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(numbers, torch.rand(3))
    assert content(other_trainer.artifacts, interrupted(other_trainer, stage, [2, 3])) == whole


def test_micro_batches_give_the_gradient_of_the_whole_batch(small: SmallLine, trainer: Trainer) -> None:
    """Micro-batches of 3, 3 and 2 rows give the mean over all tokens."""
    trainer.trunk(trunk_stage(small, 6))
    whole = [(p.loss, p.grad_norm) for p in trainer.points]
    trainer.points.clear()
    line = small.line.model_copy(update={"micro_batch_rows": 3})
    trainer.trunk(trunk_stage(SmallLine(line, small.ledger, small.data_keys), 6))
    for (loss, norm), point in zip(whole, trainer.points, strict=True):
        assert point.loss == pytest.approx(loss, rel=1e-5)
        assert point.grad_norm == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ({"preset": "llama-9000b"}, "unknown preset"),
        ({"config": {"hidden_size": 8}}, "model_type"),
        ({"config": {"model_type": "not-a-model"}}, "cannot be built"),
        ({"config": SMALL_CONFIG | {"num_attention_heads": 5}}, "cannot be built"),
        ({"config": SMALL_CONFIG | {"vocab_size": 100}}, "token embeddings"),
        ({"config": SMALL_CONFIG | {"max_position_embeddings": 16}}, "16 positions"),
    ],
)
def test_an_impossible_architecture_is_rejected(
    small: SmallLine, trainer: Trainer, architecture: dict[str, object], reason: str
) -> None:
    line = small.line.model_copy(update={"architecture": ArchitectureSpec.model_validate(architecture)})
    with pytest.raises(StageInputInvalid, match=reason):
        trainer.trunk(trunk_stage(SmallLine(line, small.ledger, small.data_keys), 2))


def test_training_restores_the_process_wide_settings(small: SmallLine, trainer: Trainer) -> None:
    before = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    trainer.trunk(trunk_stage(small, 1))
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_the_loss_curve_is_golden(small: SmallLine, trainer: Trainer) -> None:
    """Trunk and branch over two data versions. A refactoring must not change the curve."""
    trainer.trunk(trunk_stage(small, 24))
    trainer.branch(branch_stage(small, 24, 16, stream_steps=8, replay_fraction=0.5))
    losses = [point.loss for point in trainer.points]
    golden = Path(__file__).parents[2] / "golden" / "tiny_loss_curve.json"
    assert losses == pytest.approx(json.loads(golden.read_text()), rel=2e-3), (
        f"if the change is intended, write these to {golden.name}: {[round(loss, 5) for loss in losses]}"
    )
