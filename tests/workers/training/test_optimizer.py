"""AdamW and Muon share the parameters, and their state survives forks and resumes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from service.core.errors import ArtifactCorrupt
from service.core.specs import ArchitectureSpec
from service.core.stage_specs import LineSpec, Numerics
from tests.support.specs import line_spec
from tests.support.training import SMALL_CONFIG
from workers.training.loss import NextTokenLoss
from workers.training.model import TokenizerFacts, build_model
from workers.training.optimizer import Optimizer, build_optimizer, load_optimizer, optimizer_tensors
from workers.training.process import numerics_applied

GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
OPTIMIZERS = ("adamw", "muon")
QUERY, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


def line_of(optimizer: str, config: dict[str, Any] = SMALL_CONFIG, *, tied: bool = True) -> LineSpec:
    architecture = ArchitectureSpec(config=config | {"tie_word_embeddings": tied})
    return line_spec(architecture=architecture, optimizer=optimizer, numerics=Numerics(threads=2))


def started(line: LineSpec) -> tuple[PreTrainedModel, Optimizer]:
    model = build_model(line, TokenizerFacts(vocab_size=300, end_of_text=0)).train()
    return model, build_optimizer(model, line)


def train(line: LineSpec, model: PreTrainedModel, optimizer: Optimizer, steps: range) -> list[float]:
    """Train and return the losses. The rows and the dropout of a step depend on its number alone."""
    losses = []
    with numerics_applied(line.numerics), torch.random.fork_rng():
        loss_of = NextTokenLoss(model)
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = line.peak_lr
            torch.manual_seed(step)
            # Each token determines the next one, so the model can learn.
            first = torch.randint(0, 300, (8, 1))
            loss = loss_of((first + 7 * torch.arange(33)) % 300) / (8 * 32)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
    return losses


def trained(line: LineSpec, steps: int) -> tuple[PreTrainedModel, Optimizer]:
    model, optimizer = started(line)
    train(line, model, optimizer, range(steps))
    return model, optimizer


def saved(model: PreTrainedModel, optimizer: Optimizer) -> dict[str, Tensor]:
    """The state after a round trip through bytes, as in a checkpoint."""
    return load(save(optimizer_tensors(optimizer, model)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("config", "tables", "head", "matrices_a_layer"),
    [
        (SMALL_CONFIG, {"model.embed_tokens.weight"}, "lm_head.weight", 7),
        (GPT2, {"transformer.wte.weight", "transformer.wpe.weight"}, "lm_head.weight", 4),
    ],
    ids=["llama", "gpt2"],
)
def test_muon_takes_the_hidden_matrices_and_adamw_the_rest(
    config: dict[str, Any], tables: set[str], head: str, matrices_a_layer: int, tied: bool
) -> None:
    model, optimizer = started(line_of("muon", config, tied=tied))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{names[parameter] for parameter in group["params"]} for group in optimizer.param_groups]
    decayed, vectors, hidden = groups
    assert decayed == (tables if tied else tables | {head})
    assert vectors == {name for parameter, name in names.items() if parameter.ndim == 1}
    assert hidden == set(names.values()) - decayed - vectors
    assert len(hidden) == 2 * matrices_a_layer
    assert ["betas" in group for group in optimizer.param_groups] == [True, True, False]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1]


def test_adamw_alone_takes_everything_and_decays_matrices_only() -> None:
    model, optimizer = started(line_of("adamw", tied=False))
    dimensions = [{parameter.ndim for parameter in group["params"]} for group in optimizer.param_groups]
    assert dimensions == [{2}, {1}]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_a_learning_rate_set_in_every_group_reaches_every_parameter() -> None:
    model, optimizer = started(line_of("muon"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    line = line_of("muon").model_copy(update={"peak_lr": 0.0})
    train(line, model, optimizer, range(2))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    train(line_of("muon"), model, optimizer, range(1))
    assert not any(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_muons_first_update_is_about_as_large_as_adamws() -> None:
    """Muon's has a root mean square of 0.2 times the rate; AdamW's is 0.2 to 0.4 once its moments settle."""
    model, optimizer = started(line_of("muon").model_copy(update={"weight_decay": 0.0}))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(line_of("muon"), model, optimizer, range(1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in optimizer.param_groups[-1]["params"]:
        name = names[parameter]
        size = (parameter - before[name]).square().mean().sqrt().item()
        assert 0.1 < size / line_of("muon").peak_lr < 0.3, name


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("config", [SMALL_CONFIG, GPT2], ids=["llama", "gpt2"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(name: str, config: dict[str, Any]) -> None:
    """On two threads. Two runs from one state are equal too, so a fork starts as its trunk continues."""
    line = line_of(name, config)
    model, optimizer = trained(line, 4)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = save(optimizer_tensors(optimizer, model))
    losses = train(line, model, optimizer, range(4, 10))
    for _ in range(2):
        again, fresh = started(line)
        again.load_state_dict(weights)
        load_optimizer(fresh, again, load(state))
        assert train(line, again, fresh, range(4, 10)) == losses
        for (key, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other), key
        ends = saved(again, fresh), saved(model, optimizer)
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_state_tensors_are_named_after_parameter_and_kind() -> None:
    tensors = saved(*trained(line_of("muon"), 1))
    assert {key for key in tensors if key.startswith((QUERY, NORM))} == {
        f"{QUERY}.momentum_buffer",
        f"{NORM}.step",
        f"{NORM}.exp_avg",
        f"{NORM}.exp_avg_sq",
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_state_before_the_first_step_is_empty_and_loads() -> None:
    model, optimizer = started(line_of("muon"))
    assert optimizer_tensors(optimizer, model) == {}
    load_optimizer(optimizer, model, {})
    train(line_of("muon"), model, optimizer, range(1))


DAMAGES: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a matrix's momentum is missing": lambda state: state.pop(f"{QUERY}.momentum_buffer"),
    "a vector's step is missing": lambda state: state.pop(f"{NORM}.step"),
    "AdamW's state for a Muon matrix": lambda state: state.update({f"{QUERY}.exp_avg": torch.zeros(32, 32)}),
    "an unknown parameter": lambda state: state.update({"other.exp_avg": torch.zeros(32)}),
    "a misshapen momentum": lambda state: state.update({f"{QUERY}.momentum_buffer": torch.zeros(32, 31)}),
    "a step that is not a scalar": lambda state: state.update({f"{NORM}.step": torch.zeros(1)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_state_that_does_not_match_the_optimizer_exactly_is_corrupt(damage: str) -> None:
    line = line_of("muon")
    state = saved(*trained(line, 1))
    DAMAGES[damage](state)
    model, optimizer = started(line)
    with pytest.raises(ArtifactCorrupt, match="the optimizer state"):
        load_optimizer(optimizer, model, state)


@pytest.mark.parametrize("names", [OPTIMIZERS, OPTIMIZERS[::-1]])
def test_the_state_of_the_other_optimizer_is_corrupt(names: tuple[str, str]) -> None:
    state = saved(*trained(line_of(names[0]), 1))
    model, optimizer = started(line_of(names[1]))
    with pytest.raises(ArtifactCorrupt, match="another model or optimizer"):
        load_optimizer(optimizer, model, state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_goes_down(name: str) -> None:
    line = line_of(name)
    losses = train(line, *started(line), range(60))
    assert losses[0] > 5.5
    assert losses[-1] < losses[0] - 1
