"""A Llama in float32 on a CPU, in as few calls as its products allow.

The architecture that lines are trained with by default. transformers' own layers take some fifty calls each; for the few
rows of a decode step (10 M parameters, 16 rows) what they cost beside the arithmetic is a quarter of the pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from workers.serving.engine.huge_pages import HugePages
from workers.serving.engine.llama_products import Linear, faster_products
from workers.serving.engine.packed_linear import EVERY_NUMBER

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
        linear = faster_products(body.layers)
        self.num_rows_fed = linear.num_rows_fed
        positions_1L = torch.arange(num_positions)[None]
        cos_1LD, sin_1LD = body.rotary_emb(body.embed_tokens.weight, positions_1L)
        half = cos_1LD.shape[-1] // 2
        self._rotations_LE = torch.complex(cos_1LD[0, :, :half], sin_1LD[0, :, :half])
        self._embeddings_VC: Tensor = body.embed_tokens.weight
        memory = HugePages()
        self._layers = [_Layer(layer, linear, memory) for layer in body.layers]
        self._norm = _Norm(body.norm)
        self._head = linear(model.lm_head.weight, model.lm_head.bias, memory)

    def compile(self) -> None:
        """Have compiled now what the first passes over so many rows would wait for, with logits of few of them."""
        if not self._head.compiles:
            return
        for num_rows in dict.fromkeys(map(self.num_rows_fed, range(1, COMPILED_ROWS + 1))):
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
    def __init__(self, layer: Any, linear: type[Linear], memory: HugePages) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._dimension: int = attention.head_dim
        self._scale: float = attention.scaling
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._num_heads, self._num_key_heads, _ = (
            projection.weight.shape[0] // self._dimension for projection in projections
        )
        self._attention_norm = _Norm(layer.input_layernorm)
        self._in = linear(*_joined(projections, self._dimension), memory)
        self._out = linear(attention.o_proj.weight, attention.o_proj.bias, memory)
        self._mlp_norm = _Norm(layer.post_attention_layernorm)
        self._gated = linear.gated(mlp.gate_proj, mlp.up_proj, memory)
        self._down = linear(mlp.down_proj.weight, mlp.down_proj.bias, memory)

    def __call__(self, number: int, x_TC: Tensor, rotations_T1E: Tensor, attend: Attend) -> Tensor:
        values_begin = self._num_heads + self._num_key_heads
        projected = self._in(self._attention_norm(x_TC)).view(len(x_TC), -1, self._dimension)
        rotated = torch.view_as_complex(projected[:, :values_begin].unflatten(-1, (-1, 2)))
        rotated *= rotations_T1E
        query_THD = projected[:, : self._num_heads]
        key_TGD, value_TGD = projected[:, self._num_heads : values_begin], projected[:, values_begin:]
        attended_THD = attend(number, query_THD, key_TGD, value_TGD, self._scale)
        x_TC = self._out.added_to(x_TC, attended_THD.reshape(len(x_TC), -1))
        return self._down.added_to(x_TC, self._gated(self._mlp_norm(x_TC)))


class _Norm:
    def __init__(self, norm: Any) -> None:
        self._weight_C: Tensor = norm.weight
        self._epsilon: float = norm.variance_epsilon

    def __call__(self, x_TC: Tensor) -> Tensor:
        normed: Tensor = torch.rms_norm(x_TC, self._weight_C.shape, self._weight_C, self._epsilon)
        return normed


def _joined(projections: Sequence[Any], dimension: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of queries, keys and values in one.

    The halves of a head are rotated against each other. In queries and keys the two numbers of a pair come to lie beside each
    other, as complex numbers do; they are reordered alike, so that their products stay the same.
    """
    *rotated, values = projections
    weights = [_interleaved(layer.weight, dimension) for layer in rotated]
    if values.bias is None:
        return torch.cat([*weights, values.weight]), None
    biases = [_interleaved(layer.bias, dimension) for layer in rotated]
    return torch.cat([*weights, values.weight]), torch.cat([*biases, values.bias])


def _interleaved(rows: Tensor, dimension: int) -> Tensor:
    """Of every head, the numbers i and i + dimension / 2 beside each other."""
    heads: Tensor = rows.view(-1, 2, dimension // 2, *rows.shape[1:])
    return heads.transpose(1, 2).flatten(0, 2)
