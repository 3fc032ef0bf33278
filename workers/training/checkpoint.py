"""Checkpoints: everything that a training stage needs to resume as if it had never been interrupted.

    config.json            the architecture: from_pretrained can load a checkpoint
    model.safetensors      the weights in fp32
    optimizer.safetensors  moments and step counts by parameter name (absent if no stage resumes from the checkpoint)
    state.json             the step, which is also the data position, and the beta2 of the moments
    metrics.jsonl          one point per line, from the stage's first step on

There is no random generator state to save: dropout is seeded for every step from the line's seed, the step and the
rank. So a run can resume with a different number of workers.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel

from service.artifacts import Artifacts
from service.core.artifact_files import METRICS, WEIGHTS
from service.core.errors import ArtifactCorrupt, ArtifactMissing
from service.core.plan import checkpoint_key, checkpoint_prefix, checkpoint_step
from service.core.stage_specs import TrainStage
from workers.training.optimizer import Optimizer, beta2_of, change_beta2, load_optimizer, optimizer_tensors

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """The live state of a training run. ``points`` are the rows of ``metrics.jsonl``."""

    model: PreTrainedModel
    optimizer: Optimizer
    step: int = 0
    points: list[dict[str, float | int]] = field(default_factory=list)


def newest_checkpoint(stage: TrainStage, artifacts: Artifacts) -> str | None:
    """The key of the newest intact checkpoint that the stage can resume from; None for the initial weights.

    If the trunk's newest checkpoint is corrupt, the stage resumes from an earlier one and repeats some steps. Any other
    run without a checkpoint of its own starts from ``start_key``, which nothing can replace.
    """
    published = set(artifacts.keys(checkpoint_prefix(stage)))
    steps = {checkpoint_step(key) for key in published}
    for step in sorted((step for step in steps if step <= stage.to_step), reverse=True):
        key = checkpoint_key(stage, step)
        if key not in published:  # from a trunk of this line with other data
            continue
        try:
            artifacts.open(key)
        except (ArtifactCorrupt, ArtifactMissing) as error:
            logger.warning("skipped a damaged checkpoint: %s", error.detail)
            continue
        return key
    return stage.start_key if stage.path is not None else None


@dataclass(frozen=True)
class Snapshot:
    """A copy of the training state at one step, which can be written while training continues."""

    config: PretrainedConfig
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor] | None  # None if no stage resumes from it
    step: int
    beta2: float
    points: list[dict[str, float | int]]

    @classmethod
    def of(cls, state: TrainingState, *, resumable: bool = True) -> "Snapshot":
        """Copy the state to the CPU: 12 bytes per parameter, or 4 if it is not ``resumable``."""
        return cls(
            config=state.model.config,
            weights=_copy_to_cpu(_weights(state.model)),
            moments=_copy_to_cpu(optimizer_tensors(state.optimizer, state.model)) if resumable else None,
            step=state.step,
            beta2=beta2_of(state.optimizer),
            points=list(state.points),
        )

    def write(self, directory: Path) -> None:
        self.config.save_pretrained(directory)
        save_file(self.weights, directory / WEIGHTS, metadata={"format": "pt"})
        if self.moments is not None:
            save_file(self.moments, directory / OPTIMIZER)
        (directory / STATE).write_text(json.dumps({"step": self.step, "beta2": self.beta2}))
        (directory / METRICS).write_text("".join(json.dumps(point) + "\n" for point in self.points))


def _copy_to_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(
            tensor.detach()
        )
        for name, tensor in tensors.items()
    }


def load_start(state: TrainingState, folder: Path, *, step: int, fresh_optimizer: bool) -> None:
    """Start a run at ``step`` from another stage's last checkpoint: its weights and, unless fresh, its optimizer."""
    load_weights(state.model, folder)
    if not fresh_optimizer:
        load_optimizer(state.optimizer, state.model, load_file(folder / OPTIMIZER))
        change_beta2(state.optimizer, _saved_beta2(state, folder))
    state.step = step


def _saved_beta2(state: TrainingState, folder: Path) -> float:
    saved = json.loads((folder / STATE).read_text())
    return float(saved.get("beta2", beta2_of(state.optimizer)))  # absent from checkpoints of early releases


def load_checkpoint(state: TrainingState, folder: Path, *, points_after: int) -> None:
    """Restore a saved state, with the points of the steps after ``points_after``."""
    load_weights(state.model, folder)
    load_optimizer(state.optimizer, state.model, load_file(folder / OPTIMIZER))
    state.step = json.loads((folder / STATE).read_text())["step"]
    points = (json.loads(line) for line in (folder / METRICS).read_text().splitlines())
    state.points = [point for point in points if point["step"] > points_after]


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy the saved weights into the model. Raises ArtifactCorrupt unless names and shapes match exactly."""
    saved, weights = load_file(folder / WEIGHTS), _weights(model)
    if saved.keys() != weights.keys():
        raise ArtifactCorrupt(
            f"{WEIGHTS} does not match the architecture: {sorted(saved.keys() ^ weights.keys())[:3]}"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            if tensor.shape != saved[name].shape:
                raise ArtifactCorrupt(
                    f"{WEIGHTS}: {name} has shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
                )
            tensor.copy_(saved[name])


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers. Tied weights appear once, under the name that from_pretrained expects."""
    tensors = model.state_dict(keep_vars=True)
    first_names = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor for name, tensor in tensors.items() if first_names[id(tensor)] == name}
