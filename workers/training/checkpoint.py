"""Checkpoints: everything a training stage needs to go on as if it had never been interrupted.

    config.json            the architecture: a checkpoint loads with from_pretrained
    model.safetensors      weights in fp32
    optimizer.safetensors  moments and step counts by parameter name (where nothing goes on from here, none)
    state.json             the step, which is the data position and, with the seed, the random state; beta2 of its moments
    metrics.jsonl          one point a line, from the stage's first step on

Random numbers (dropout, where a configuration has it) are seeded for every step from the line's seed, the
step and the rank, so there is no generator state to save, and any number of workers may take up a
checkpoint.
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
from service.core.errors import ArtifactCorrupt, ArtifactMissing
from service.core.plan import checkpoint_key, checkpoint_prefix, checkpoint_step
from service.core.stage_specs import TrainStage
from workers.training.optimizer import Optimizer, beta2_of, change_beta2, load_optimizer, optimizer_tensors

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
METRICS = "metrics.jsonl"

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """What works, and what is saved. ``points`` are rows of ``metrics.jsonl``."""

    model: PreTrainedModel
    optimizer: Optimizer
    step: int = 0
    points: list[dict[str, float | int]] = field(default_factory=list)


def newest_checkpoint(stage: TrainStage, artifacts: Artifacts) -> str | None:
    """Key of the newest intact checkpoint that the stage may go on from; None for the initial weights.

    A run that has none of its own begins at ``start_key``, and cannot do without it. For the trunk that is
    one of many checkpoints: where one is corrupt, the one before it costs steps, not the stage.
    """
    published = set(artifacts.keys(checkpoint_prefix(stage)))
    steps = {checkpoint_step(key) for key in published}
    for step in sorted((step for step in steps if step <= stage.to_step), reverse=True):
        key = checkpoint_key(stage, step)
        if key not in published:  # a trunk of this line that has read other data
            continue
        try:
            artifacts.open(key)
        except (ArtifactCorrupt, ArtifactMissing) as error:
            logger.warning("checkpoint passed over: %s", error.detail)
            continue
        return key
    return stage.start_key if stage.path is not None else None


@dataclass(frozen=True)
class Snapshot:
    """A state as it was at one step, in memory of its own: it can be written while training goes on."""

    config: PretrainedConfig
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor] | None  # None: nothing goes on from here
    step: int
    beta2: float
    points: list[dict[str, float | int]]

    @classmethod
    def of(cls, state: TrainingState, *, resumable: bool = True) -> "Snapshot":
        """Copy what is saved to the CPU: 12 bytes a parameter, 4 where it is not ``resumable``."""
        return cls(
            config=state.model.config,
            weights=_copied(_weights(state.model)),
            moments=_copied(optimizer_tensors(state.optimizer, state.model)) if resumable else None,
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


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(
            tensor.detach()
        )
        for name, tensor in tensors.items()
    }


def load_start(state: TrainingState, folder: Path, *, step: int, fresh_optimizer: bool) -> None:
    """Begin a run at ``step`` with another stage's end: its weights and, unless it begins afresh, its optimizer."""
    load_weights(state.model, folder)
    if not fresh_optimizer:
        load_optimizer(state.optimizer, state.model, load_file(folder / OPTIMIZER))
        change_beta2(state.optimizer, _beta2_of_moments(state, folder))
    state.step = step


def _beta2_of_moments(state: TrainingState, folder: Path) -> float:
    saved = json.loads((folder / STATE).read_text())
    return float(saved.get("beta2", beta2_of(state.optimizer)))  # checkpoints of early versions do not tell


def load_checkpoint(state: TrainingState, folder: Path, *, points_after: int) -> None:
    """Put the state back as it was saved, with the points of the steps after ``points_after``."""
    load_weights(state.model, folder)
    load_optimizer(state.optimizer, state.model, load_file(folder / OPTIMIZER))
    state.step = json.loads((folder / STATE).read_text())["step"]
    points = (json.loads(line) for line in (folder / METRICS).read_text().splitlines())
    state.points = [point for point in points if point["step"] > points_after]


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Copy the saved weights into the module. Raises ArtifactCorrupt unless they are exactly the module's."""
    saved, weights = load_file(folder / WEIGHTS), _weights(model)
    if saved.keys() != weights.keys():
        raise ArtifactCorrupt(
            f"{WEIGHTS} is of another architecture: {sorted(saved.keys() ^ weights.keys())[:3]}"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            if tensor.shape != saved[name].shape:
                raise ArtifactCorrupt(f"{WEIGHTS}: {name} has shape {tuple(saved[name].shape)}")
            tensor.copy_(saved[name])


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers, a tied one once, under the name that from_pretrained expects."""
    saved = model.state_dict(keep_vars=True)
    once = {id(tensor): name for name, tensor in reversed(saved.items())}
    return {name: tensor for name, tensor in saved.items() if once[id(tensor)] == name}
