"""Models as transformers modules, from a preset, a configuration or a base checkpoint; their parameters."""

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

# Matrix kernels like multiples of 64; the rows past the tokenizer's vocabulary are never a target.
VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class TokenizerFacts:
    """What a model must know of its tokenizer."""

    vocab_size: int
    end_of_text: int

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "TokenizerFacts":
        """Read them from the result of a tokenizer stage."""
        return cls(vocab_size=int(result["vocab_size"]), end_of_text=int(result["end_of_text"]))


@dataclass(frozen=True)
class ParameterCounts:
    """``embedding`` are tables to look up in, ``output_head`` gives the logits; a tied table is both."""

    total: int
    embedding: int
    output_head: int
    non_embedding: int


def line_model(line: LineSpec, artifacts: Artifacts) -> PreTrainedModel:
    """Build the line's module with its initial weights; tokenizer and base are read from ``artifacts``."""
    manifest = artifacts.manifest(line.tokenizer_key)
    if manifest is None:
        raise ArtifactMissing(f"{line.tokenizer_key}: no such artifact")
    base = line.architecture.base
    return build_model(
        line, TokenizerFacts.of(manifest.result), None if base is None else artifacts.open(base)
    )


def build_model(line: LineSpec, tokenizer: TokenizerFacts, base: Path | None = None) -> PreTrainedModel:
    """Build the line's module with its initial weights in fp32: a function of the line alone, on any worker.

    ``base`` is the folder of the base checkpoint where the line has one. Raises StageInputInvalid.
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
    except Exception as error:  # transformers raises all sorts for a configuration that cannot be built
        raise StageInputInvalid(f"the architecture cannot be built: {error}") from error
    _check_fit(model, line, tokenizer)
    return model


def _config(line: LineSpec, tokenizer: TokenizerFacts) -> PreTrainedConfig:
    architecture = line.architecture
    if architecture.preset is not None:
        if architecture.preset not in PRESETS:
            raise StageInputInvalid(f"unknown preset {architecture.preset!r}; there are {', '.join(PRESETS)}")
        vocab_size = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        config = PRESETS[architecture.preset](vocab_size, line.sequence_length)
        config.bos_token_id = config.eos_token_id = tokenizer.end_of_text
        return config
    assert architecture.config is not None
    given = dict(architecture.config)
    model_type = given.pop("model_type", None)
    if not isinstance(model_type, str):
        raise StageInputInvalid("the architecture's config names no model_type")
    defaults = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
    }
    config = AutoConfig.for_model(model_type, **(defaults | given))
    if not {"max_position_embeddings", "n_positions"} & given.keys():
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
            f"the model has {rows} token embeddings, its tokenizer {tokenizer.vocab_size} tokens"
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and longest < line.sequence_length:
        raise StageInputInvalid(f"the model has {longest} positions, a row {line.sequence_length} tokens")


def count_parameters(model: PreTrainedModel) -> ParameterCounts:
    """Count every parameter once; position tables count as embeddings."""
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    in_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()

    def count(ids: set[int]) -> int:
        return sum(size for key, size in parameters.items() if key in ids)

    return ParameterCounts(
        total=sum(parameters.values()),
        embedding=count(tables),
        output_head=count(in_head),
        non_embedding=count(parameters.keys() - tables - in_head),
    )
