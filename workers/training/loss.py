"""The next-token loss, with output head and cross-entropy fused: a batch's logits are never in memory.

The logits are by far the largest tensor of a batch (16 × 256 tokens × vocabulary 8,192: 128 MiB, and again
for their gradient). Here a block of rows at a time goes through the head, the loss and both products of the
backward pass while it is in the cache. That works because the loss is a plain sum, so a row's gradient does
not depend on other rows.

Shape suffixes: B rows, T tokens, D hidden size, V vocabulary, N = B·T targets.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

# Rows of logits per block. On a CPU a block should fit in the cache; a GPU needs large products.
BLOCK_ROWS_CPU = 256
BLOCK_ROWS_CUDA = 2048


class NextTokenLoss(nn.Module):
    """Sums the cross-entropy of a causal model over rows of tokens. Training and evaluation use it."""

    def __init__(self, model: PreTrainedModel, *, compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self._head_is_plain = _head_is_plain(model)
        body = model.base_model if self._head_is_plain else model
        self._body = torch.compile(body, dynamic=False) if compiled else body

    def forward(self, rows_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return the sum over the targets, in nats.

        ``rows_BT`` has shape (B, T + 1). ``mask_BT``, of shape (B, T), selects targets; None selects all.
        """
        targets = rows_BT[:, 1:] if mask_BT is None else rows_BT[:, 1:][mask_BT]
        if self._head_is_plain:
            hidden_BTD = self._body(input_ids=rows_BT[:, :-1], use_cache=False).last_hidden_state
            hidden_ND = hidden_BTD.flatten(0, 1) if mask_BT is None else hidden_BTD[mask_BT]
            weight_VD = self.model.get_output_embeddings().weight
            return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets.flatten())  # type: ignore[no-any-return, no-untyped-call]
        logits_BTV = self._body(input_ids=rows_BT[:, :-1], use_cache=False).logits
        logits_NV = logits_BTV.flatten(0, 1) if mask_BT is None else logits_BTV[mask_BT]
        return functional.cross_entropy(logits_NV.float(), targets.flatten(), reduction="sum")


def _head_is_plain(model: PreTrainedModel) -> bool:
    """Test on a short input whether the logits are just ``hidden @ weight.T``: no bias, scale or soft cap."""
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
    """``cross_entropy(hidden_ND @ weight_VD.T, targets_N, reduction="sum")``.

    Log-probabilities are fp32; matrix products use autocast's dtype. With p = softmax(logits), the gradient
    of the sum is p - onehot(target) for each row of logits; ``forward`` already carries it back to hidden
    states and weight.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        device = hidden_ND.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_ND.dtype
        block = BLOCK_ROWS_CUDA if device == "cuda" else BLOCK_ROWS_CPU
        with_gradient = any(ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            hidden_ND, head_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
            loss = torch.zeros((), device=hidden_ND.device)
            hidden_grad = torch.empty_like(hidden_ND, dtype=torch.float32) if with_gradient else None
            weight_grad = torch.zeros_like(weight_VD, dtype=torch.float32) if with_gradient else None
            for start in range(0, len(hidden_ND), block):
                rows, targets = hidden_ND[start : start + block], targets_N[start : start + block]
                indices = torch.arange(len(rows), device=rows.device)
                log_probs = torch.log_softmax(rows @ head_VD.t(), dim=-1, dtype=torch.float32)
                loss -= log_probs[indices, targets].sum()
                if hidden_grad is not None and weight_grad is not None:
                    logits_grad = log_probs.exp_()
                    logits_grad[indices, targets] -= 1
                    logits_grad = logits_grad.to(dtype)
                    hidden_grad[start : start + block] = logits_grad @ head_VD
                    if dtype == torch.float32:
                        weight_grad.addmm_(logits_grad.t(), rows)
                    else:  # sum over the blocks in fp32
                        weight_grad += logits_grad.t() @ rows
        if with_gradient:
            ctx.save_for_backward(hidden_grad, weight_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * gradients[0], weight_grad * gradients[0], None
