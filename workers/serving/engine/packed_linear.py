"""Linear layers on a CPU with their weights in oneDNN's blocked layout, as ``torch.compile`` lays them out too.

``nn.Linear`` has its weight reordered at every call, which for the few rows of a decode step costs more than the
product: 10 M parameters in float32, 16 rows, two cores: 6.9 ms a pass, packed 2.9.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

EVERY_NUMBER = 16  # up to this: the steps of as many sequences, which nothing should slow down
LARGEST_STEP = 64  # between the numbers beyond: of more than 512 rows at most an eighth is computed in vain


def pack_weight(weight_NK: Tensor) -> Tensor:
    """A copy in the blocked layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach().contiguous())
    return packed


class PackedLinear(nn.Module):
    """``x @ weight_NK.T + bias``, x and result float32 of shape (..., K) and (..., N)."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self._weight = pack_weight(weight_NK)
        self._bias = bias_N

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return product


def num_rows_fed(num_rows: int) -> int:
    """How many rows to compute where ``num_rows`` are wanted: of each number up to 16, then of a multiple of 8, beyond 64 of an
    eighth of the next power of two, at most 64.

    For every number of rows oneDNN compiles the products anew, a millisecond each, and keeps what it has compiled: 2 to 5 MiB a
    number in a Llama of 10 M parameters.
    """
    if num_rows <= EVERY_NUMBER:
        return num_rows
    step = min(max(8, 1 << ((num_rows - 1).bit_length() - 3)), LARGEST_STEP)
    return -(-num_rows // step) * step


def can_pack() -> bool:
    """Whether this build of torch has oneDNN's packed products; they are not part of its documented interface."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Packing:
    """Replaces the linear layers of a model in place; ``undo`` puts the old ones back."""

    def __init__(self, model: nn.Module) -> None:
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        for parent, name, module in list(_linears(model)):
            weight_NK = module.weight.t() if isinstance(module, Conv1D) else module.weight
            setattr(parent, name, PackedLinear(weight_NK, module.bias))
            self._replaced.append((parent, name, module))

    def undo(self) -> None:
        for parent, name, module in self._replaced:
            setattr(parent, name, module)


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | Conv1D]]:
    """Parent, attribute and layer of every float32 linear layer; no subclasses, whose forward may do more."""
    for parent in model.modules():
        for name, module in parent.named_children():
            if type(module) not in (nn.Linear, Conv1D):
                continue
            assert isinstance(module, nn.Linear | Conv1D)
            if module.weight.dtype is torch.float32:
                yield parent, name, module
