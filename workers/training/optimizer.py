"""AdamW, alone or with Muon for the hidden matrices, and their state as tensors named after parameters."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from service.core.errors import ArtifactCorrupt
from service.core.stage_specs import LineSpec


class Optimizer:
    """Several optimizers as one, each with its share of the parameters.

    ``param_groups`` holds the groups of all. Only AdamW's groups have ``betas``. Setting ``lr`` in every
    group changes the learning rate of every parameter.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        self.param_groups: list[dict[str, Any]] = [group for part in parts for group in part.param_groups]
        # All parts can share one table, because each looks up only its own parameters.
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
    """Build the line's optimizer over the trainable parameters.

    Muon orthogonalises a matrix's momentum, which suits matrices that map hidden states to hidden states.
    AdamW keeps embedding tables, the head and vectors (Jordan et al. 2024). Muon's update is scaled by
    0.2·√max(rows, columns), about the size of AdamW's, so both share ``peak_lr`` and ``weight_decay`` (Liu et
    al. 2025, arXiv 2502.16982). Unlike Jordan's, this factor is the same for a transposed matrix, as in
    GPT-2.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if line.optimizer == "adamw":
        return Optimizer(_adamw(parameters, line))
    hidden = _hidden_matrices(model)
    muon = torch.optim.Muon(
        [p for p in parameters if p in hidden],
        weight_decay=line.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return Optimizer(_adamw([p for p in parameters if p not in hidden], line), muon)


def _adamw(parameters: Iterable[nn.Parameter], line: LineSpec) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with weight decay on matrices only, as in nanoGPT.

    The matrices include token tables: a tied one is also the output head, and the largest matrix of a small
    model. The fused kernel is elementwise, and therefore deterministic, and needs one pass over memory.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": line.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=line.betas, fused=True)


def _hidden_matrices(model: PreTrainedModel) -> set[nn.Parameter]:
    """All matrices except the embedding tables (tokens, positions, …) and the output head."""
    excluded: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    excluded += [m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None]
    excluded_parameters = {parameter for module in excluded for parameter in module.parameters()}
    return {p for p in model.parameters() if p.ndim == 2 and p not in excluded_parameters}


def set_beta2(optimizer: Optimizer, beta2: float) -> None:
    """Set AdamW's β₂ from the next step on."""
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (group["betas"][0], beta2)


def beta2_of(optimizer: Optimizer) -> float:
    """AdamW's β₂."""
    [beta2] = {group["betas"][1] for group in optimizer.param_groups if "betas" in group}
    return float(beta2)


def change_beta2(optimizer: Optimizer, before: float) -> None:
    """Rescale AdamW's second moments, accumulated under β₂ = ``before``, to continue under the current β₂.

    AdamW estimates the squared gradient as v / (1 - β₂^t). A new β₂ changes that divisor at once, and the
    size of the first steps with it: changing 0.95 to 0.999 after 90 steps would make them 3.4 times too
    small. Multiplying v by (1 - after^t) / (1 - before^t) leaves the estimate as it was, and it stays
    unbiased.
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
    """Return moments and step counts as ``<parameter>.<state>``, such as ``lm_head.weight.exp_avg``."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore the tensors of ``optimizer_tensors``, which are none before the first step.

    Raises ArtifactCorrupt unless names and shapes are exactly those of this optimizer's state.
    """
    if not tensors:
        return
    shapes = _state_shapes(optimizer)
    names = {name: parameter for name, parameter in model.named_parameters() if parameter in shapes}
    expected = {f"{name}.{key}" for name, parameter in names.items() for key in shapes[parameter]}
    if tensors.keys() != expected:
        raise ArtifactCorrupt(
            f"the optimizer state belongs to another model or optimizer: {sorted(tensors.keys() ^ expected)[:3]}"
        )
    for name, parameter in names.items():
        state = {key: tensors[f"{name}.{key}"] for key in shapes[parameter]}
        for key, shape in shapes[parameter].items():
            if state[key].shape != shape:
                raise ArtifactCorrupt(
                    f"the optimizer state: {name}.{key} has shape {tuple(state[key].shape)}, not {tuple(shape)}"
                )
        optimizer.state[parameter] = {
            key: value.to(parameter.device, torch.float32) for key, value in state.items()
        }


def _state_shapes(optimizer: Optimizer) -> dict[nn.Parameter, dict[str, torch.Size]]:
    """The tensors that AdamW and Muon keep between steps for each of their parameters."""
    shapes = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            shape = parameter.shape
            if "betas" in group:
                shapes[parameter] = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
            else:
                shapes[parameter] = {"momentum_buffer": shape}
    return shapes
