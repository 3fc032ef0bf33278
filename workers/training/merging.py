"""Weighted sums of checkpoints, in the place of a decay."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from service.core.artifact_files import CONFIG, WEIGHTS
from service.core.errors import ArtifactCorrupt, Stopped


def merged_weights(
    folders: Sequence[Path], weights: Sequence[float], should_stop: Callable[[], bool]
) -> dict[str, torch.Tensor]:
    """Σ weight·tensor over the checkpoints, summed in float64 in their order, in the tensors' own type.

    One checkpoint is in memory at a time beside the sum. Raises ArtifactCorrupt where they are not of one architecture,
    and Stopped.
    """
    total: dict[str, torch.Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for number, (folder, weight) in enumerate(zip(folders, weights, strict=True)):
        if should_stop():
            raise Stopped("stopped while merging checkpoints")
        tensors = load_file(folder / WEIGHTS)
        if number == 0:
            total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tensors.items()}
            types = {name: tensor.dtype for name, tensor in tensors.items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != {
            name: tensor.shape for name, tensor in total.items()
        }:
            raise ArtifactCorrupt(f"{folder.name}: {WEIGHTS} is of another architecture than the first's")
        for name, tensor in tensors.items():
            total[name].add_(tensor.double(), alpha=weight)
    return {name: tensor.to(types[name]) for name, tensor in total.items()}


def save_weights(weights: Mapping[str, torch.Tensor], like: Path, directory: Path) -> None:
    """Write them as a checkpoint from which nothing is trained: with the config of the one at ``like``, without an optimizer."""
    shutil.copyfile(like / CONFIG, directory / CONFIG)
    save_file(dict(weights), directory / WEIGHTS, metadata={"format": "pt"})
