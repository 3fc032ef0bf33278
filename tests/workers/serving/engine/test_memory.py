"""Memory estimates agree with the tensors of the export."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from workers.serving.engine import memory
from workers.serving.engine.batching.transformers_engine import TransformersLoader
from workers.serving.engine.options import EngineOptions

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_weights_are_sized_in_the_type_they_are_computed_in(export: Path) -> None:
    tensors = load_file(export / "model.safetensors")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert memory.weight_bytes(export, CPU) == 4 * numbers
    assert memory.weight_bytes(export, CUDA) == sum(tensor.nbytes for tensor in tensors.values())


def test_the_cache_estimate_grows_with_tokens_up_to_its_bound(export: Path) -> None:
    config = json.loads((export / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    a_token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * width * 4
    context = config["max_position_embeddings"]
    assert memory.cache_bytes(export, CPU, num_slots=3, max_bytes=1 << 40) == 3 * context * a_token
    assert memory.cache_bytes(export, CPU, num_slots=3, max_bytes=1000) == 1000


def test_a_loader_counts_weights_and_cache(export: Path) -> None:
    small = TransformersLoader(options=EngineOptions(max_slots=1)).needed_bytes(export)
    large = TransformersLoader(options=EngineOptions(max_slots=2)).needed_bytes(export)
    assert large - small == memory.cache_bytes(export, CPU, num_slots=1, max_bytes=1 << 40)
    assert TransformersLoader().free_bytes() > 1 << 20


def test_a_tighter_cgroup_limit_bounds_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    everything = memory.free_bytes(CPU)
    assert everything > 1 << 20
    (tmp_path / "memory.max").write_text("9000\n")
    (tmp_path / "memory.stat").write_text("anon 4000\ninactive_file 700\nslab_reclaimable 50\n")
    assert memory.free_bytes(CPU) == 9000 - 5000 + 750
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.free_bytes(CPU) == 0
