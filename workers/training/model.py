"""Builds a line's model from a preset, a configuration or a base checkpoint, and counts its parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from service.artifacts import Artifacts
from service.core.errors import ArtifactMissing, StageInputInvalid
from service.core.stage_specs import LineSpec
from workers.training.presets import PRESETS, rotary_positions
from workers.training.pretrained import load_model, new_model

# Matrix kernels are fastest with multiples of 64. Rows past the tokenizer's vocabulary are never a target.
VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class TokenizerFacts:
    """The properties of a tokenizer that shape a model."""

    vocab_size: int
    end_of_text: int

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "TokenizerFacts":
        """Read them from the result of a tokenizer stage."""
        return cls(vocab_size=int(result["vocab_size"]), end_of_text=int(result["end_of_text"]))


@dataclass(frozen=True)
class ParameterCounts:
    """``embedding`` counts lookup tables, ``output_head`` the logits' matrix. A tied table is in both."""

    total: int
    embedding: int
    output_head: int
    non_embedding: int


def line_model(line: LineSpec, artifacts: Artifacts) -> PreTrainedModel:
    """Build the line's model with its initial weights, from the artifacts that the line names."""
    manifest = artifacts.manifest(line.tokenizer_key)
    if manifest is None:
        raise ArtifactMissing(f"{line.tokenizer_key}: the tokenizer of this line is missing")
    base = line.architecture.base
    return build_model(
        line, TokenizerFacts.of(manifest.result), None if base is None else artifacts.open(base)
    )


def build_model(line: LineSpec, tokenizer: TokenizerFacts, base: Path | None = None) -> PreTrainedModel:
    """Build the line's model with its initial weights in fp32. The weights depend on the arguments alone.

    ``base`` is the folder of the base checkpoint, if the line has one. Raises StageInputInvalid.
    """
    options = {"dtype": torch.float32, "attn_implementation": line.numerics.attention}
    try:
        if base is not None:
            model = load_model(base, **options)
        else:
            config = _config(line, tokenizer)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(line.seed)
                model = new_model(config, **options)
    except StageInputInvalid:
        raise
    except Exception as error:  # transformers raises many types for a configuration that cannot be built
        raise StageInputInvalid(f"the architecture cannot be built: {error}") from error
    _check_fit(model, line, tokenizer)
    return model


def _config(line: LineSpec, tokenizer: TokenizerFacts) -> PreTrainedConfig:
    architecture = line.architecture
    if architecture.preset is not None:
        if architecture.preset not in PRESETS:
            known = ", ".join(PRESETS)
            raise StageInputInvalid(f"unknown preset {architecture.preset!r}; the presets are {known}")
        vocab_size = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        config = PRESETS[architecture.preset](vocab_size, line.sequence_length)
        config.bos_token_id = config.eos_token_id = tokenizer.end_of_text
        return config
    assert architecture.config is not None
    options = dict(architecture.config)
    model_type = options.pop("model_type", None)
    if not isinstance(model_type, str):
        raise StageInputInvalid("the architecture's config has no model_type")
    defaults = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
    }
    config = AutoConfig.for_model(model_type, **(defaults | options))
    if not {"max_position_embeddings", "n_positions"} & options.keys():
        rotary = getattr(config, "rope_parameters", None) is not None
        config.max_position_embeddings = (
            rotary_positions(line.sequence_length) if rotary else line.sequence_length
        )
    return config


def _check_fit(model: PreTrainedModel, line: LineSpec, tokenizer: TokenizerFacts) -> None:
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)
    rows = table.num_embeddings
    if rows < tokenizer.vocab_size:
        raise StageInputInvalid(
            f"the model has {rows} token embeddings, but its tokenizer has {tokenizer.vocab_size} tokens"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < line.sequence_length:
        raise StageInputInvalid(
            f"the model has {positions} positions, but the sequence length is {line.sequence_length}"
        )


def count_parameters(model: PreTrainedModel) -> ParameterCounts:
    """Count the parameters, each once. Position tables count as embeddings."""
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    in_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()

    def count(ids: set[int]) -> int:
        return sum(size for key, size in sizes.items() if key in ids)

    return ParameterCounts(
        total=sum(sizes.values()),
        embedding=count(tables),
        output_head=count(in_head),
        non_embedding=count(sizes.keys() - tables - in_head),
    )
