"""The fused loss and its gradient equal those of cross-entropy over full logits."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.training import SMALL_CONFIG
from workers.training import loss as loss_module
from workers.training.loss import NextTokenLoss

MODELS: dict[str, dict[str, Any]] = {
    "tied": SMALL_CONFIG,
    "untied": SMALL_CONFIG | {"tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "head with a bias": {
        "model_type": "phi",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    | {"num_attention_heads": 2},
    "soft-capped logits": SMALL_CONFIG
    | {"model_type": "gemma2", "head_dim": 16, "final_logit_softcapping": 1.0},
}


def model_of(name: str) -> PreTrainedModel:
    config = dict(MODELS[name])
    torch.manual_seed(3)
    configuration = AutoConfig.for_model(
        config.pop("model_type"), vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=None, **config
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(configuration)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_equal_those_of_cross_entropy_over_logits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "BLOCK_ROWS_CPU", 7)
    model = model_of(name)
    rows = torch.randint(0, 300, (3, 20))
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    expected.backward()
    gradients = {
        key: parameter.grad.clone()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    loss = NextTokenLoss(model)(rows)
    (2 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, parameter in model.named_parameters():
        if key in gradients:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, 2 * gradients[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["tied", "head with a bias"])
def test_masked_targets_do_not_count(name: str) -> None:
    loss_of = NextTokenLoss(model_of(name))
    rows = torch.randint(0, 300, (3, 20))
    mask = torch.ones(3, 19, dtype=torch.bool)
    mask[1, 5:] = False
    masked = loss_of(rows, mask).item()
    assert masked + loss_of(rows, ~mask).item() == pytest.approx(loss_of(rows).item(), rel=1e-5)
    rows[1, 6:] = 0
    assert loss_of(rows, mask).item() == pytest.approx(masked, rel=1e-5)


def test_autocast_multiplies_in_bf16_and_sums_in_fp32() -> None:
    model = model_of("tied")
    rows = torch.randint(0, 300, (3, 20))
    exact = NextTokenLoss(model)(rows)
    with torch.autocast("cpu", torch.bfloat16):
        rough = NextTokenLoss(model)(rows)
    rough.backward()
    assert rough.dtype == torch.float32
    assert rough.item() != exact.item()
    assert rough.item() == pytest.approx(exact.item(), rel=1e-2)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
