"""The configuration and the machine determine the engine."""

from pathlib import Path

import pytest
import torch

from service.artifacts import Artifacts
from workers.serving.engine import loader
from workers.serving.engine.batching.transformers_engine import TransformersLoader
from workers.serving.engine.options import EngineOptions
from workers.serving.engine.port import EngineError
from workers.serving.engine.vllm import library as vllm_library
from workers.serving.engine.vllm.loader import VllmLoader
from workers.serving.local_serving import LocalServing


def test_vllm_is_chosen_if_it_is_installed_and_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_library, "is_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(loader.engine_loader(0, {}), TransformersLoader)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(loader.engine_loader(0, {}), VllmLoader)
    assert isinstance(loader.engine_loader(0, {"engine": "transformers"}), TransformersLoader)
    monkeypatch.setattr(vllm_library, "is_installed", lambda: False)
    assert isinstance(loader.engine_loader(0, {}), TransformersLoader)
    with pytest.raises(ValueError, match="'tgi' is not a valid EngineName"):
        loader.engine_loader(0, {"engine": "tgi"})


def test_missing_options_keep_the_engines_defaults() -> None:
    chosen = loader.engine_loader(0, {"engine": "vllm", "max_waiting": 7})
    assert isinstance(chosen, VllmLoader)
    assert chosen.options == EngineOptions(max_slots=256, max_waiting=7)
    other = loader.engine_loader(0, {"engine": "transformers", "max_slots": 2})
    assert isinstance(other, TransformersLoader)
    assert other.options == EngineOptions(max_slots=2)


def test_asking_for_vllm_without_installing_it_fails_with_the_reason(
    export: Path, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_library, "is_installed", lambda: False)
    chosen = loader.engine_loader(0, {"engine": "vllm"})
    with pytest.raises(EngineError, match=r"pip install 'pathswitch\[vllm\]'"):
        chosen.load(export, 60)
    with pytest.raises(ValueError, match="vLLM is not installed"):
        LocalServing(artifacts, "127.0.0.1", 0, engine={"engine": "vllm"})
