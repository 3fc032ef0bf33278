"""Models from presets, configurations and base checkpoints depend on their line alone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from service.core.errors import StageInputInvalid
from service.core.specs import ArchitectureSpec
from service.core.stage_specs import LineSpec
from tests.support.specs import line_spec
from tests.support.training import SMALL_CONFIG
from workers.training.model import TokenizerFacts, build_model, count_parameters
from workers.training.presets import PRESETS

FACTS = TokenizerFacts(vocab_size=4095, end_of_text=0)


def line_with(**architecture: object) -> LineSpec:
    return line_spec(architecture=ArchitectureSpec.model_validate(architecture))


def test_the_tiny_preset_is_tiny() -> None:
    model = build_model(line_with(preset="tiny"), FACTS)
    counts = count_parameters(model)
    assert counts.total == 1_328_256
    assert counts.embedding == counts.output_head == 4096 * 128
    assert counts.non_embedding == counts.total - counts.embedding
    assert model.config.max_position_embeddings == 512
    assert model.config.eos_token_id == 0


@pytest.mark.parametrize(
    ("name", "vocab_size", "millions"),
    [
        ("llama-7m", 8192, 7.2),
        ("llama-42m", 32_000, 42),
        ("gpt2-124m", 50_304, 124),
        ("llama-360m", 32_000, 374),
        ("llama-1.2b", 32_000, 1188),
    ],
)
def test_presets_have_the_documented_size_and_no_dropout(name: str, vocab_size: int, millions: float) -> None:
    config = PRESETS[name](vocab_size, 1024)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counts = count_parameters(model)
    assert counts.total / 1e6 == pytest.approx(millions, rel=0.01)
    dropouts = {"attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"} & config.to_dict().keys()
    assert dropouts
    assert not any(config.to_dict()[key] for key in dropouts)
    untied = 0 if config.tie_word_embeddings else counts.output_head
    assert counts.total == counts.non_embedding + counts.embedding + untied


def test_learned_positions_end_at_the_trained_length_and_rotary_ones_beyond() -> None:
    assert PRESETS["gpt2-124m"](50_304, 128).max_position_embeddings == 128
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}
    assert build_model(line_with(config=gpt2), FACTS).config.max_position_embeddings == 128
    assert build_model(line_with(config=SMALL_CONFIG), FACTS).config.max_position_embeddings == 512


def test_initial_weights_depend_on_the_seed_alone() -> None:
    line = line_with(config=SMALL_CONFIG)
    first = build_model(line, FACTS).state_dict()
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    again = build_model(line, FACTS).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = build_model(line.model_copy(update={"seed": 1}), FACTS).state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_base_checkpoint_provides_weights_and_shape(tmp_path: Path) -> None:
    model = build_model(line_with(config=SMALL_CONFIG | {"vocab_size": 4100}), FACTS)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = build_model(line_with(base="base/x"), FACTS, tmp_path)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())


def test_a_pickled_base_checkpoint_is_rejected(tmp_path: Path) -> None:
    model = build_model(line_with(config=SMALL_CONFIG), FACTS)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(StageInputInvalid, match="cannot be built"):
        build_model(line_with(base="base/x"), FACTS, tmp_path)
