"""Weighted sums of checkpoints, which replace the decay in the merge paradigm."""

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
    """Compute Σᵢ weightᵢ · tensorᵢ for every tensor, in float64 and in order. Keeps the tensor's dtype.

    Only the sum and one checkpoint are in memory at a time. Raises Stopped, and ArtifactCorrupt if the
    architectures differ.
    """
    total: dict[str, torch.Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for number, (folder, weight) in enumerate(zip(folders, weights, strict=True)):
        if should_stop():
            raise Stopped("stopped while merging checkpoints")
        tensors = load_file(folder / WEIGHTS)
        if number == 0:
            total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tensors.items()}
            dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != {
            name: tensor.shape for name, tensor in total.items()
        }:
            raise ArtifactCorrupt(
                f"{folder.name}: the architecture in {WEIGHTS} differs from the first checkpoint's"
            )
        for name, tensor in tensors.items():
            total[name].add_(tensor.double(), alpha=weight)
    return {name: tensor.to(dtypes[name]) for name, tensor in total.items()}


def save_weights(weights: Mapping[str, torch.Tensor], like: Path, directory: Path) -> None:
    """Write a checkpoint without optimizer state, with a copy of the config in the folder ``like``."""
    shutil.copyfile(like / CONFIG, directory / CONFIG)
    save_file(dict(weights), directory / WEIGHTS, metadata={"format": "pt"})
