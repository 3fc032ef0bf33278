"""The loss of next-token prediction, head and cross-entropy in one, without the logits of a batch in memory.

A vocabulary is wide, so the logits of a batch are its largest tensor by far (16 × 256 tokens × 8,192: 128
MiB, and as much again for their gradient). Here a block of a few rows of logits lives in the cache from the
product that makes it to the two products that use its gradient, which is known at once: the loss is a plain
sum.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

# Rows of logits at a time. On a CPU a block should fit the cache; a GPU wants large products.
_BLOCK_ROWS_CPU = 256
_BLOCK_ROWS_CUDA = 2048


class NextTokenLoss(nn.Module):
    """Sums the cross-entropy of a causal model over rows of tokens, in training as in evaluation."""

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self._head_is_plain = _head_is_plain(model)
        body = model.base_model if self._head_is_plain else model
        self._body = torch.compile(body, dynamic=False) if compiled else body

    def forward(self, rows_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Sum in nats over the targets of ``rows_BT``, (rows, length + 1), where ``mask_BT`` is true."""
        targets = rows_BT[:, 1:] if mask_BT is None else rows_BT[:, 1:][mask_BT]
        if self._head_is_plain:
            hidden_BTD = self._body(input_ids=rows_BT[:, :-1], use_cache=False).last_hidden_state
            hidden = hidden_BTD.flatten(0, 1) if mask_BT is None else hidden_BTD[mask_BT]
            weight = self.model.get_output_embeddings().weight
            return _LinearCrossEntropy.apply(hidden, weight, targets.flatten())  # type: ignore[no-any-return, no-untyped-call]
        logits_BTV = self._body(input_ids=rows_BT[:, :-1], use_cache=False).logits
        logits = logits_BTV.flatten(0, 1) if mask_BT is None else logits_BTV[mask_BT]
        return functional.cross_entropy(logits.float(), targets.flatten(), reduction="sum")


def _head_is_plain(model: PreTrainedModel) -> bool:
    """Whether the logits are exactly ``hidden @ weight.T``, without a bias, scale or soft cap: tried out."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or len(list(head.parameters())) > 1 or model.base_model is model:
        return False
    ids = torch.arange(8, device=head.weight.device)[None] % head.out_features
    training = model.training
    model.eval()
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        plain = torch.equal(
            functional.linear(hidden, head.weight), model(input_ids=ids, use_cache=False).logits
        )
    model.train(training)
    return plain


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed ``cross_entropy(hidden @ weight.T, targets)``: logits in fp32, products in autocast's type."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        block = _BLOCK_ROWS_CUDA if device == "cuda" else _BLOCK_ROWS_CPU
        with_gradient = any(ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            hidden, head = hidden.to(dtype), weight.to(dtype)
            loss = torch.zeros((), device=hidden.device)
            hidden_grad = torch.empty_like(hidden, dtype=torch.float32) if with_gradient else None
            weight_grad = torch.zeros_like(weight, dtype=torch.float32) if with_gradient else None
            for start in range(0, len(hidden), block):
                rows, wanted = hidden[start : start + block], targets[start : start + block]
                each = torch.arange(len(rows), device=rows.device)
                log_probabilities = torch.log_softmax(rows @ head.t(), dim=-1, dtype=torch.float32)
                loss -= log_probabilities[each, wanted].sum()
                if hidden_grad is not None and weight_grad is not None:
                    logits_grad = log_probabilities.exp_()
                    logits_grad[each, wanted] -= 1
                    logits_grad = logits_grad.to(dtype)
                    hidden_grad[start : start + block] = logits_grad @ head
                    if dtype == torch.float32:
                        weight_grad.addmm_(logits_grad.t(), rows)
                    else:  # summed over the blocks in fp32
                        weight_grad += logits_grad.t() @ rows
        if with_gradient:
            ctx.save_for_backward(hidden_grad, weight_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * gradients[0], weight_grad * gradients[0], None
