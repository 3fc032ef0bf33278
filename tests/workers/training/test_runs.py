"""Runs other than branches, and merges: they start from initial weights or another stage's end."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from service.artifacts import Artifacts
from service.core.errors import ArtifactCorrupt, Stopped
from service.core.ledger import total_steps
from service.core.manifest import Manifest
from service.core.plan import merge_key
from service.core.schedules import run_rate
from service.core.specs import ArchitectureSpec
from service.core.stage_specs import MergeStage, RunPath, StageKind, TrainStage
from tests.support.training import SMALL_CONFIG, SmallLine, Trainer, trunk_stage
from workers.training import batches

FIRST = RunPath(warmup_steps=3, decay_steps=12, shape="cosine", floor=0.1, resumable=True, stream_steps=15)
SECOND = RunPath(decay_steps=6, shape="cosine", floor=0.1, resumable=True, stream_steps=6)


def run_stage_of(
    small: SmallLine, path: RunPath, from_step: int = 0, start: str | None = None, every: int = 1000
) -> TrainStage:
    return TrainStage(
        line=small.line,
        ledger=small.ledger,
        from_step=from_step,
        to_step=from_step + path.steps,
        start_key=start,
        path=path,
        checkpoint_every=every,
    )


def tensors(artifacts: Artifacts, manifest: Manifest, name: str = "model") -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(artifacts.open(manifest.key) / f"{name}.safetensors")
    return loaded


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_follows_the_learning_rates_of_its_path(small: SmallLine, trainer: Trainer) -> None:
    trainer.train(run_stage_of(small, FIRST))
    expected = [run_rate(k, FIRST, small.line.peak_lr) for k in range(1, 16)]
    assert [point.learning_rate for point in trainer.points] == expected
    assert trainer.points[-1].loss < trainer.points[0].loss


def test_a_run_can_start_from_anothers_end_with_its_optimizer_or_a_fresh_one(
    small: SmallLine, trainer: Trainer
) -> None:
    first = trainer.train(run_stage_of(small, FIRST))
    ends = {}
    for fresh in (False, True):
        path = SECOND.model_copy(update={"fresh_optimizer": fresh})
        ends[fresh] = trainer.train(run_stage_of(small, path, 15, first.key))
        assert ends[fresh].result["resumed_from_step"] == 15
    # The first step has the same weights and rows; different moments move the weights differently.
    assert ends[False].result["first_loss"] == ends[True].result["first_loss"]
    assert ends[False].result["loss"] != ends[True].result["loss"]
    steps = {
        fresh: tensors(trainer.artifacts, end, "optimizer")["model.norm.weight.step"].item()
        for fresh, end in ends.items()
    }
    assert steps == {False: 21, True: 6}


def test_a_run_counts_from_its_own_first_step_even_if_its_start_made_more_steps(
    small: SmallLine, trainer: Trainer
) -> None:
    """As after a decay with replay, which makes more steps than it reads from the stream."""
    longer = RunPath(decay_steps=20, stream_steps=15, replay_fraction=0.25, resumable=True)
    first = trainer.train(run_stage_of(small, longer))
    trainer.points.clear()
    second = trainer.train(run_stage_of(small, SECOND, 15, first.key))
    assert [point.step for point in trainer.points] == list(range(16, 22))
    assert (second.result["from_step"], second.result["step"]) == (15, 21)


@pytest.mark.parametrize(
    "path",
    [
        FIRST,
        RunPath(hold_steps=9, decay_steps=6, order="shuffled", stream_steps=15),
        RunPath(hold_steps=15, level=0.1, resumable=True, stream_steps=15),
    ],
    ids=["cosine", "shuffled", "low"],
)
def test_an_interrupted_run_ends_in_the_same_bits(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer, path: RunPath
) -> None:
    stage = run_stage_of(small, path, every=4)
    whole = trainer.train(stage)
    for step in (2, 9):
        other_trainer.stop_at = step
        with pytest.raises(Stopped):
            other_trainer.train(stage)
    other_trainer.stop_at = None
    again = other_trainer.train(stage)
    assert again.result["resumed_from_step"] == 9
    assert equal(tensors(trainer.artifacts, whole), tensors(other_trainer.artifacts, again))
    assert whole.result["loss"] == again.result["loss"]


def test_an_interrupted_trunk_with_replay_ends_in_the_same_bits(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer
) -> None:
    entry = small.ledger[1]
    ledger = (small.ledger[0], entry.model_copy(update={"steps": 2 * entry.steps}))
    stage = trunk_stage(small, small.ledger[0].steps).model_copy(
        update={"ledger": ledger, "to_step": total_steps(ledger)}
    )
    whole = trainer.trunk(stage)
    other_trainer.stop_at = small.ledger[0].steps + 3
    with pytest.raises(Stopped):
        other_trainer.trunk(stage)
    other_trainer.stop_at = None
    again = other_trainer.trunk(stage)
    assert equal(tensors(trainer.artifacts, whole), tensors(other_trainer.artifacts, again))
    plain = trainer.trunk(trunk_stage(small, total_steps(small.ledger)))
    assert not equal(tensors(trainer.artifacts, whole), tensors(trainer.artifacts, plain))


def test_the_number_of_open_packs_is_limited(
    small: SmallLine, trainer: Trainer, other_trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = RunPath(hold_steps=8, order="shuffled", stream_steps=8)
    unlimited = trainer.train(run_stage_of(small, path))
    monkeypatch.setattr(batches, "OPEN_PACKS", 1)
    one_at_a_time = other_trainer.train(run_stage_of(small, path))
    assert equal(tensors(trainer.artifacts, unlimited), tensors(other_trainer.artifacts, one_at_a_time))


def merge_stage(small: SmallLine, keys: tuple[str, ...], weights: tuple[float, ...]) -> MergeStage:
    return MergeStage(line=small.line, checkpoint_keys=keys, weights=weights)


def merge(trainer: Trainer, stage: MergeStage) -> Manifest:
    return trainer.run(StageKind.MERGE, merge_key(stage), stage)


def test_a_merge_is_the_weighted_sum_of_its_checkpoints(small: SmallLine, trainer: Trainer) -> None:
    ends = [trainer.trunk(trunk_stage(small, step)) for step in (6, 9, 12)]
    weights = (0.5, 0.3, 0.2)
    merged = merge(trainer, merge_stage(small, tuple(end.key for end in ends), weights))
    parts = [tensors(trainer.artifacts, end) for end in ends]
    for name, tensor in tensors(trainer.artifacts, merged).items():
        expected = sum(weight * part[name] for weight, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(tensor, expected)
        assert tensor.dtype == parts[0][name].dtype
    assert merged.result == {"merged": 3}
    assert {file.path for file in merged.files} == {"config.json", "model.safetensors"}


def test_a_merge_of_one_checkpoint_is_that_checkpoint(small: SmallLine, trainer: Trainer) -> None:
    end = trainer.trunk(trunk_stage(small, 6))
    merged = merge(trainer, merge_stage(small, (end.key,), (1.0,)))
    assert equal(tensors(trainer.artifacts, merged), tensors(trainer.artifacts, end))
    config = json.loads((trainer.artifacts.open(merged.key) / "config.json").read_text())
    assert config["model_type"] == "llama"


def test_checkpoints_of_two_architectures_are_not_merged(small: SmallLine, trainer: Trainer) -> None:
    wider = ArchitectureSpec(config=SMALL_CONFIG | {"intermediate_size": 96})
    other = replace(small, line=small.line.model_copy(update={"architecture": wider}))
    keys = tuple(trainer.trunk(trunk_stage(line, 3)).key for line in (small, other))
    with pytest.raises(ArtifactCorrupt, match="differs from the first checkpoint"):
        merge(trainer, merge_stage(small, keys, (0.5, 0.5)))


@pytest.mark.parametrize("beta2", [0.9, 0.999])
def test_a_decay_with_another_beta2_starts_with_steps_of_the_same_size(
    small: SmallLine, trainer: Trainer, beta2: float
) -> None:
    """The second moments stay unbiased when beta2 changes, and when it changes back."""
    start = trainer.trunk(trunk_stage(small, 12))
    first = RunPath(hold_steps=1, resumable=True, stream_steps=1)
    plain = trainer.train(run_stage_of(small, first, 12, start.key))
    changed = trainer.train(run_stage_of(small, first.model_copy(update={"beta2": beta2}), 12, start.key))
    back = trainer.train(run_stage_of(small, first, 13, changed.key))
    before = tensors(trainer.artifacts, start)

    def moved(to: Manifest, since: dict[str, torch.Tensor]) -> float:
        after = tensors(trainer.artifacts, to)
        return math.sqrt(sum((after[name] - since[name]).norm().item() ** 2 for name in after))

    usual = moved(plain, before)
    assert moved(changed, before) == pytest.approx(usual, rel=0.15)
    assert moved(back, tensors(trainer.artifacts, changed)) == pytest.approx(usual, rel=0.3)
