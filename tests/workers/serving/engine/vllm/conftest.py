"""Engines on vLLM, or on a stand-in with its interface where it is not installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tiny_export import write_tiny_export
from tests.workers.serving.engine.vllm import stand_in
from tests.workers.serving.engine.vllm.vllm_engines import (
    HIDDEN_SIZE,
    OPTIONS,
    close,
    needs_vllm,
)
from workers.serving.engine.batching.transformers_engine import TransformersEngine
from workers.serving.engine.vllm import engine as vllm_engine
from workers.serving.engine.vllm.arguments import engine_arguments
from workers.serving.engine.vllm.engine import VllmEngine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export-for-vllm")
    write_tiny_export(folder, seed=1, hidden_size=HIDDEN_SIZE)
    return folder


@pytest.fixture(scope="module", params=["stand-in", pytest.param("vllm", marks=needs_vllm)])
def vllm(request: pytest.FixtureRequest) -> Iterator[str]:
    """The library that ``import vllm`` finds."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            stand_in.install(patch)
        else:
            # bfloat16 would change the tokens, and compilation takes minutes on a CPU.
            exact = {"dtype": "float32", "enforce_eager": True}
            patch.setattr(vllm_engine, "engine_arguments", lambda *a, **k: engine_arguments(*a, **k) | exact)
        yield request.param


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch)
    monkeypatch.setattr(vllm_engine, "engine_arguments", engine_arguments)


@pytest.fixture(scope="module")
def engine(folder: Path, vllm: str) -> Iterator[VllmEngine]:
    engine = VllmEngine(folder, OPTIONS)
    yield engine
    close(engine)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Iterator[TransformersEngine]:
    engine = TransformersEngine(folder)
    yield engine
    engine.close()
