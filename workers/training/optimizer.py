"""AdamW alone or with Muon for the hidden matrices, and their state as plain tensors by parameter name."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from service.core.errors import ArtifactCorrupt
from service.core.stage_specs import LineSpec


class Optimizer:
    """Optimizers that share out a model's parameters, as one. ``param_groups`` are their own dicts.

    Only AdamW's groups have ``betas``; a rate set in every group reaches every parameter.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        self.param_groups: list[dict[str, Any]] = [group for part in parts for group in part.param_groups]
        # One table for all: each looks up its own parameters and no others.
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        for part in parts:
            part.state = self.state

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=set_to_none)


def build_optimizer(model: PreTrainedModel, line: LineSpec) -> Optimizer:
    """The line's optimizer over the parameters that train. Raises ValueError for a name it does not know.

    Muon orthogonalises a matrix's momentum, which suits matrices that map hidden states to hidden states;
    token and position tables, the head and vectors stay with AdamW (Jordan et al. 2024). Its update is scaled
    by 0.2·√max(rows, columns), about the size of AdamW's, so one ``peak_lr`` and one ``weight_decay`` serve
    both (Liu et al. 2025, arXiv 2502.16982). That factor, unlike Jordan's, is the same for a transposed
    matrix, as GPT-2 keeps them.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if line.optimizer == "adamw":
        return Optimizer(_adamw(parameters, line))
    if line.optimizer == "muon":
        hidden = _hidden_matrices(model)
        muon = torch.optim.Muon(
            [p for p in parameters if p in hidden],
            weight_decay=line.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        return Optimizer(_adamw([p for p in parameters if p not in hidden], line), muon)
    raise ValueError(f"unknown optimizer {line.optimizer!r}")


def _adamw(parameters: Iterable[nn.Parameter], line: LineSpec) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, token tables among them, as in nanoGPT.

    A tied token table is also the output head: without it the largest matrix of a small model would not
    decay. The fused kernel updates in one pass over memory, and element by element, so it is deterministic.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": line.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=line.betas, fused=True)


def _hidden_matrices(model: PreTrainedModel) -> set[nn.Parameter]:
    """Matrices but the tables (of tokens, positions, …) and the head, tied or not."""
    outer: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outer += [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    excluded = {parameter for module in outer for parameter in module.parameters()}
    return {p for p in model.parameters() if p.ndim == 2 and p not in excluded}


def set_beta2(optimizer: Optimizer, beta2: float) -> None:
    """Of its AdamW, from the next step on."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (group["betas"][0], beta2)


def beta2_of(optimizer: Optimizer) -> float:
    """β₂ of its AdamW."""
    [beta2] = {group["betas"][1] for group in optimizer.param_groups if "betas" in group}
    return float(beta2)


def change_beta2(optimizer: Optimizer, before: float) -> None:
    """Rescale AdamW's second moments, gathered under β₂ = ``before``, for going on under its own.

    AdamW divides the moment by 1 - β₂^t to make it unbiased. Under another β₂ that divisor changes at once, and the
    first steps with it: after 90 steps, 0.999 for 0.95 would make them 3.4 times too small. Scaled by the divisors'
    ratio the estimate is the same at the change, and stays unbiased.
    """
    after = beta2_of(optimizer)
    if after == before:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if "betas" in group else ():
            if state := optimizer.state[parameter]:
                t = state["step"].item()
                state["exp_avg_sq"].mul_((1 - after**t) / (1 - before**t))


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Moments and step counts as ``<parameter>.<state>``, e.g. ``lm_head.weight.exp_avg``."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave; nothing at all for one that has made no step.

    Raises ArtifactCorrupt unless the tensors are exactly the state of these parameters in this optimizer.
    """
    if not tensors:
        return
    shapes = _state_shapes(optimizer)
    names = {name: parameter for name, parameter in model.named_parameters() if parameter in shapes}
    expected = {f"{name}.{key}" for name, parameter in names.items() for key in shapes[parameter]}
    if tensors.keys() != expected:
        raise ArtifactCorrupt(
            f"the optimizer's state is of another model or optimizer: {sorted(tensors.keys() ^ expected)[:3]}"
        )
    for name, parameter in names.items():
        state = {key: tensors[f"{name}.{key}"] for key in shapes[parameter]}
        for key, shape in shapes[parameter].items():
            if state[key].shape != shape:
                raise ArtifactCorrupt(
                    f"the optimizer's state: {name}.{key} has shape {tuple(state[key].shape)}"
                )
        optimizer.state[parameter] = {
            key: value.to(parameter.device, torch.float32) for key, value in state.items()
        }


def _state_shapes(optimizer: Optimizer) -> dict[nn.Parameter, dict[str, torch.Size]]:
    """What AdamW and Muon keep of each of their parameters between steps."""
    shapes = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            whole = parameter.shape
            if "betas" in group:
                shapes[parameter] = {"step": torch.Size(), "exp_avg": whole, "exp_avg_sq": whole}
            else:
                shapes[parameter] = {"momentum_buffer": whole}
    return shapes
