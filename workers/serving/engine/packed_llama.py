"""A Llama in float32 on a CPU, in as few calls as its products allow: oneDNN's packed ones, or BLAS's with the weights transposed.

The architecture that lines are trained with by default. transformers' own layers take some fifty calls each; for the few
rows of a decode step (10 M parameters, 16 rows) what they cost beside the arithmetic is a quarter of the pass. Which products
are faster is the machine's: it is tried.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import LlamaForCausalLM

from workers.serving.engine.packed_linear import EVERY_NUMBER, num_rows_fed, pack_weight

logger = logging.getLogger(__name__)

TRIED_BYTES = 32 << 20
TRIED_ROUNDS = 31
CLEARLY = 0.95  # so that machines of a kind choose alike
COMPILED_ROWS = 512  # of most turns with 16 slots; more are compiled when they come

# Attends in one layer to what slots hold and these rows add: (layer, query (T, H, D), key and value (T, G, D), scale) to
# (T, H, D).
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


def is_packable(model: Any) -> bool:
    """Whether it is a Llama itself, no subclass of which the layers may do more."""
    return type(model) is LlamaForCausalLM and model.config.hidden_act == "silu"


class PackedLlama:
    """Holds copies of the linear weights and the rest as it is, not the model. ``num_positions``: of the longest sequence."""

    def __init__(self, model: LlamaForCausalLM, num_positions: int) -> None:
        body: Any = model.model
        self._linear = linear = _faster(body.layers)
        positions_1L = torch.arange(num_positions)[None]
        cos_1LD, sin_1LD = body.rotary_emb(body.embed_tokens.weight, positions_1L)
        half = cos_1LD.shape[-1] // 2
        self._rotations_LE = torch.complex(cos_1LD[0, :, :half], sin_1LD[0, :, :half])
        self._embeddings_VC: Tensor = body.embed_tokens.weight
        self._layers = [_Layer(layer, linear) for layer in body.layers]
        self._norm = _Norm(body.norm)
        self._head = linear(model.lm_head)

    def compile(self) -> None:
        """Have oneDNN compile now what the first passes over so many rows would wait for, with logits of few of them."""
        if self._linear is not _Packed:
            return
        for num_rows in dict.fromkeys(map(num_rows_fed, range(1, COMPILED_ROWS + 1))):
            rows_T = torch.zeros(num_rows, dtype=torch.long)
            x_TC = self._layers[0](
                0,
                self._embeddings_VC[rows_T],
                self._rotations_LE[rows_T][:, None],
                lambda _, query, *__: query,
            )
            self._head(self._norm(x_TC[:EVERY_NUMBER]))

    def __call__(
        self, tokens_T: Tensor, positions_T: Tensor, wanted_R: Tensor | None, attend: Attend
    ) -> Tensor:
        """Logits of the wanted rows, (R, V), or of all."""
        rotations_T1E = self._rotations_LE[positions_T][:, None]
        x_TC = self._embeddings_VC[tokens_T]
        for number, layer in enumerate(self._layers):
            x_TC = layer(number, x_TC, rotations_T1E, attend)
        if wanted_R is not None:
            x_TC = x_TC[wanted_R]
        return self._head(self._norm(x_TC))


class _Layer:
    def __init__(self, layer: Any, linear: "type[_Linear]") -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._dimension: int = attention.head_dim
        self._scale: float = attention.scaling
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._num_heads, self._num_key_heads, _ = (
            projection.weight.shape[0] // self._dimension for projection in projections
        )
        self._attention_norm = _Norm(layer.input_layernorm)
        self._in = linear(*projections, paired=self._dimension)
        self._out = linear(attention.o_proj)
        self._mlp_norm = _Norm(layer.post_attention_layernorm)
        self._gate, self._up, self._down = map(linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def __call__(self, number: int, x_TC: Tensor, rotations_T1E: Tensor, attend: Attend) -> Tensor:
        values_begin = self._num_heads + self._num_key_heads
        projected = self._in(self._attention_norm(x_TC)).view(len(x_TC), -1, self._dimension)
        rotated = torch.view_as_complex(projected[:, :values_begin].unflatten(-1, (-1, 2)))
        rotated *= rotations_T1E
        query_THD = projected[:, : self._num_heads]
        key_TGD, value_TGD = projected[:, self._num_heads : values_begin], projected[:, values_begin:]
        attended_THD = attend(number, query_THD, key_TGD, value_TGD, self._scale)
        x_TC = self._out.added_to(x_TC, attended_THD.reshape(len(x_TC), -1))
        normed_TC = self._mlp_norm(x_TC)
        return self._down.added_to(x_TC, self._up.times(self._gate.silu(normed_TC), normed_TC))


class _Norm:
    def __init__(self, norm: Any) -> None:
        self._weight_C: Tensor = norm.weight
        self._epsilon: float = norm.variance_epsilon

    def __call__(self, x_TC: Tensor) -> Tensor:
        normed: Tensor = torch.rms_norm(x_TC, self._weight_C.shape, self._weight_C, self._epsilon)
        return normed


class _Linear(ABC):
    """Linear layers of the same input in one, (T, K) to (T, N), alone or with what follows.

    ``paired``: numbers of a head whose halves are rotated against each other. In all but the last of the layers (values are
    not rotated) the two numbers of a pair come to lie beside each other, as complex numbers do. Queries and keys are
    reordered alike, so that their products stay the same.
    """

    def __init__(self, *layers: Any, paired: int | None = None) -> None:
        weights = [layer.weight for layer in layers]
        biases = [layer.bias for layer in layers]
        if paired is not None:
            weights[:-1] = [_interleaved(weight, paired) for weight in weights[:-1]]
            biases[:-1] = [bias if bias is None else _interleaved(bias, paired) for bias in biases[:-1]]
        self._bias_N = None if biases[0] is None else torch.cat(biases)
        self._weight = self._laid_out(torch.cat(weights))

    @staticmethod
    @abstractmethod
    def _laid_out(weight_NK: Tensor) -> Tensor:
        """A copy of it, as it is computed with."""

    @abstractmethod
    def __call__(self, x_TK: Tensor) -> Tensor: ...

    @abstractmethod
    def silu(self, x_TK: Tensor) -> Tensor: ...

    @abstractmethod
    def added_to(self, other_TN: Tensor, x_TK: Tensor) -> Tensor: ...

    @abstractmethod
    def times(self, other_TN: Tensor, x_TK: Tensor) -> Tensor: ...


class _Packed(_Linear):
    """oneDNN's, what follows in the same call."""

    _laid_out = staticmethod(pack_weight)

    def __call__(self, x_TK: Tensor) -> Tensor:
        return self._unary(x_TK, "none")

    def silu(self, x_TK: Tensor) -> Tensor:
        return self._unary(x_TK, "swish")

    def added_to(self, other_TN: Tensor, x_TK: Tensor) -> Tensor:
        return self._binary(x_TK, other_TN, "add")

    def times(self, other_TN: Tensor, x_TK: Tensor) -> Tensor:
        return self._binary(x_TK, other_TN, "mul")

    def _unary(self, x_TK: Tensor, what: str) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, self._weight, self._bias_N, what, [], "")
        return made

    def _binary(self, x_TK: Tensor, other_TN: Tensor, what: str) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x_TK, other_TN, self._weight, self._bias_N, what
        )
        return made


class _Transposed(_Linear):
    """BLAS's, of a weight (K, N)."""

    @staticmethod
    def _laid_out(weight_NK: Tensor) -> Tensor:
        return weight_NK.detach().t().contiguous()

    def __call__(self, x_TK: Tensor) -> Tensor:
        if self._bias_N is None:
            return torch.mm(x_TK, self._weight)
        return torch.addmm(self._bias_N, x_TK, self._weight)

    def silu(self, x_TK: Tensor) -> Tensor:
        return silu(self(x_TK), inplace=True)

    def added_to(self, other_TN: Tensor, x_TK: Tensor) -> Tensor:
        if self._bias_N is not None:
            other_TN = other_TN + self._bias_N
        return torch.addmm(other_TN, x_TK, self._weight)

    def times(self, other_TN: Tensor, x_TK: Tensor) -> Tensor:
        return self(x_TK).mul_(other_TN)


def _faster(layers: Iterable[Any]) -> type[_Linear]:
    """Timed in turns, over the rows of a decode step and more weights than caches near a core hold."""
    linears = [layer.mlp.gate_proj for layer in layers]
    linears = linears[: max(1, TRIED_BYTES // linears[0].weight.nbytes)]
    kinds = (_Packed, _Transposed)
    made = {kind: [kind(linear) for linear in linears] for kind in kinds}
    x_TK = torch.zeros(EVERY_NUMBER, linears[0].weight.shape[1])
    seconds: dict[type[_Linear], list[float]] = {kind: [] for kind in kinds}
    for _ in range(TRIED_ROUNDS):
        for kind in kinds:
            began = time.perf_counter()
            for linear in made[kind]:
                linear(x_TK)
            seconds[kind].append(time.perf_counter() - began)
    packed, transposed = (median(seconds[kind]) for kind in kinds)
    logger.info("products: packed %.3f ms, transposed %.3f ms", 1e3 * packed, 1e3 * transposed)
    return _Transposed if transposed < CLEARLY * packed else _Packed


def _interleaved(rows: Tensor, dimension: int) -> Tensor:
    """Of every head, the numbers i and i + dimension / 2 beside each other."""
    heads: Tensor = rows.view(-1, 2, dimension // 2, *rows.shape[1:])
    return heads.transpose(1, 2).flatten(0, 2)
