"""AdamW, and its state as plain tensors by parameter name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from service.core.errors import ArtifactCorrupt
from service.core.stage_specs import LineSpec

Optimizer = torch.optim.AdamW


def build_optimizer(model: nn.Module, line: LineSpec) -> Optimizer:
    """AdamW with weight decay on matrices only, token tables among them, as in nanoGPT.

    A tied token table is also the output head: without it the largest matrix of a small model would not
    decay. The fused kernel updates in one pass over memory, and element by element, so it is deterministic.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": line.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return Optimizer([group for group in groups if group["params"]], betas=line.betas, fused=True)


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Moments and step counts as ``<parameter>.<state>``, e.g. ``lm_head.weight.exp_avg``."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave; nothing at all for one that has made no step."""
    if not tensors:
        return
    for name, parameter in model.named_parameters():
        state = {key: tensors.get(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
        if any(value is None for value in state.values()):
            raise ArtifactCorrupt(f"the optimizer's state has no {name}")
        optimizer.state[parameter] = {
            key: value.to(parameter.device, torch.float32)
            for key, value in state.items()
            if value is not None
        }
