"""What the transformers engine does with models that fail, and when it is closed."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.tiny_export import write_tiny_export
from tests.workers.serving.engine.engine_client import (
    check_that_closing_fails_what_is_in_flight,
    raws,
    run,
    sequence,
)
from workers.serving.engine.batching import decoder_loading
from workers.serving.engine.batching.transformers_engine import TransformersEngine
from workers.serving.engine.port import EngineError, SequenceFailed
from workers.training.pretrained import load_model

PROMPT = "The cat sat on"


@pytest.mark.parametrize("own_process", [False, True])
def test_a_version_whose_logits_are_not_finite_is_not_loaded(tmp_path: Path, own_process: bool) -> None:
    write_tiny_export(tmp_path, seed=1, broken=True)
    with pytest.raises(EngineError, match="not finite"):
        TransformersEngine(tmp_path, own_process=own_process)


def test_logits_that_become_infinite_fail_the_sequence_and_its_cache_is_discarded(
    export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(export, dtype=torch.float32)
    monkeypatch.setattr(decoder_loading, "load_model", lambda *_, **__: model)
    engine = TransformersEngine(export)
    [before] = run(engine, sequence([1, 2, 3]))
    norm = model.model.norm.weight
    with torch.inference_mode():
        original = norm.clone()
        norm.fill_(float("nan"))
        [[failure]] = run(engine, sequence([1, 2, 3]))
        [[scored]] = run(engine, sequence([1, 2, 3], max_tokens=0, echo=True, num_logprobs=0))
        norm.copy_(original)
    for failed in (failure, scored):
        assert isinstance(failed, SequenceFailed)
        assert "not finite" in failed.message
    [after] = run(engine, sequence([1, 2, 3]))
    assert raws(after) == raws(before)
    engine.close()


@pytest.mark.parametrize("own_process", [False, True])
def test_closing_fails_the_sequences_in_flight_and_rejects_more(export: Path, own_process: bool) -> None:
    engine = TransformersEngine(export, own_process=own_process)
    check_that_closing_fails_what_is_in_flight(engine, engine.encode(PROMPT))


@pytest.mark.parametrize("own_process", [False, True])
def test_a_folder_that_is_not_an_export_is_rejected(export: Path, tmp_path: Path, own_process: bool) -> None:
    with pytest.raises((OSError, ValueError)):
        TransformersEngine(tmp_path, own_process=own_process)
    shutil.copytree(export, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises((OSError, ValueError)):
        TransformersEngine(tmp_path, own_process=own_process)
