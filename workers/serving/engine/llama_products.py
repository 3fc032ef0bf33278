"""The linear layers of a Llama in float32 on a CPU: oneDNN's packed ones, or BLAS's over strips of the weight. Which are
faster is the machine's: it is tried.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from workers.serving.engine.huge_pages import HugePages
from workers.serving.engine.packed_linear import EVERY_NUMBER, num_rows_fed, pack_weight

logger = logging.getLogger(__name__)

TRIED_BYTES = 32 << 20
TRIED_ROUNDS = 15
CLEARLY = 0.95  # so that machines of a kind choose alike
STRIP = 32  # columns: two of AVX-512's registers


class Linear(ABC):
    """``x @ weight_NK.T + bias_N``, (T, K) to (T, N), alone or with what follows. It keeps a copy of the weight, in ``memory``
    where it can choose.
    """

    compiles: ClassVar[bool]  # a product for every number of rows, at its first call

    @abstractmethod
    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, memory: HugePages) -> None: ...

    @classmethod
    @abstractmethod
    def gated(cls, gate: Any, up: Any, memory: HugePages) -> Callable[[Tensor], Tensor]:
        """``silu(gate(x)) * up(x)`` of two linear layers."""

    @staticmethod
    @abstractmethod
    def num_rows_fed(num_rows: int) -> int:
        """How many rows to compute where ``num_rows`` are wanted."""

    @abstractmethod
    def __call__(self, x_TK: Tensor) -> Tensor: ...

    @abstractmethod
    def added_to(self, other_TN: Tensor, x_TK: Tensor) -> Tensor: ...


class Packed(Linear):
    """oneDNN's, what follows in the same call."""

    compiles = True
    num_rows_fed = staticmethod(num_rows_fed)

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, memory: HugePages) -> None:
        self._weight = pack_weight(weight_NK)
        self._bias_N = bias_N

    @classmethod
    def gated(cls, gate: Any, up: Any, memory: HugePages) -> Callable[[Tensor], Tensor]:
        first, second = (cls(layer.weight, layer.bias, memory) for layer in (gate, up))
        return lambda x_TK: second._binary(x_TK, first._unary(x_TK, "swish"), "mul")

    def __call__(self, x_TK: Tensor) -> Tensor:
        return self._unary(x_TK, "none")

    def added_to(self, other_TN: Tensor, x_TK: Tensor) -> Tensor:
        return self._binary(x_TK, other_TN, "add")

    def _unary(self, x_TK: Tensor, what: str) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, self._weight, self._bias_N, what, [], "")
        return made

    def _binary(self, x_TK: Tensor, other_TN: Tensor, what: str) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x_TK, other_TN, self._weight, self._bias_N, what
        )
        return made


class Strips(Linear):
    """BLAS's, a product for each 32 columns of the weight, in one call: (S, K, 32), each strip in one piece of memory.

    A few rows are multiplied about as fast as the weight is read. BLAS's kernels take a few columns after the others of a
    weight (K, N) too, and so jump from row to row: one core of a newer Xeon reads 5.5 GB/s of it from memory for 16 rows, of
    strips 8.4.
    """

    compiles = False

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, memory: HugePages) -> None:
        strips_SWK = _whole_strips(weight_NK.detach()).view(-1, STRIP, weight_NK.shape[1])
        self._weight = memory.copy(strips_SWK.transpose(1, 2))
        self._bias_S1W = None if bias_N is None else _whole_strips(bias_N).view(-1, 1, STRIP)
        self._num_columns = len(weight_NK)

    @classmethod
    def gated(cls, gate: Any, up: Any, memory: HugePages) -> Callable[[Tensor], Tensor]:
        """Both in one call, and multiplied as strips."""
        num_columns = len(gate.weight)
        weights = torch.cat([_whole_strips(layer.weight) for layer in (gate, up)])
        biases = None if gate.bias is None else torch.cat([_whole_strips(layer.bias) for layer in (gate, up)])
        both = cls(weights, biases, memory)

        def product(x_TK: Tensor) -> Tensor:
            gate_STW, up_STW = both._strips(x_TK).chunk(2)
            return _side_by_side(silu(gate_STW, inplace=True).mul_(up_STW), num_columns)

        return product

    @staticmethod
    def num_rows_fed(num_rows: int) -> int:
        return num_rows

    def __call__(self, x_TK: Tensor) -> Tensor:
        return _side_by_side(self._strips(x_TK), self._num_columns)

    def added_to(self, other_TN: Tensor, x_TK: Tensor) -> Tensor:
        return self(x_TK).add_(other_TN)

    def _strips(self, x_TK: Tensor) -> Tensor:
        strips_STW = torch.bmm(x_TK.expand(len(self._weight), *x_TK.shape), self._weight)
        return strips_STW if self._bias_S1W is None else strips_STW.add_(self._bias_S1W)


def faster_products(layers: Iterable[Any]) -> type[Linear]:
    """Of a Llama's layers. Their MLPs, two thirds of the weights, are timed in turns for the rows of a decode step: packed ones
    where they are clearly faster.

    The shortest times count: whatever else the machine does, the version before for one, may go on meanwhile.
    """
    if not torch.backends.mkl.is_available():  # another BLAS may take strips one by one
        return Packed
    memory = HugePages()
    kinds: tuple[type[Linear], ...] = (Packed, Strips)
    made: dict[type[Linear], list[tuple[Callable[[Tensor], Tensor], Linear]]] = {kind: [] for kind in kinds}
    num_bytes = 0
    for mlp in (layer.mlp for layer in layers):
        for kind in kinds:
            down = kind(mlp.down_proj.weight, mlp.down_proj.bias, memory)
            made[kind].append((kind.gated(mlp.gate_proj, mlp.up_proj, memory), down))
        num_bytes += 3 * mlp.down_proj.weight.nbytes
        if num_bytes >= TRIED_BYTES:
            break
    x_TC = torch.zeros(EVERY_NUMBER, len(mlp.down_proj.weight))
    seconds = dict.fromkeys(kinds, math.inf)
    for _ in range(TRIED_ROUNDS):
        for kind in kinds:
            began = time.perf_counter()
            for gated, down in made[kind]:
                down.added_to(x_TC, gated(x_TC))
            seconds[kind] = min(seconds[kind], time.perf_counter() - began)
    logger.info("products: packed %.3f ms, of strips %.3f ms", *(1e3 * seconds[kind] for kind in kinds))
    return Packed if seconds[Packed] < CLEARLY * seconds[Strips] else Strips


def _whole_strips(of_columns: Tensor) -> Tensor:
    """A weight (N, K) or a bias (N) with zeros for what the last strip lacks."""
    num_lacking = -len(of_columns) % STRIP
    if not num_lacking:
        return of_columns
    return pad(of_columns, (*[0] * (2 * of_columns.dim() - 1), num_lacking))


def _side_by_side(strips_STW: Tensor, num_columns: int) -> Tensor:
    """(T, N), without what fills the last strip."""
    num_strips, num_rows, width = strips_STW.shape
    return strips_STW.transpose(0, 1).reshape(num_rows, num_strips * width)[:, :num_columns]
