"""The stages from documents to an evaluated model version, as an executor runs them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.artifacts import LocalArtifacts
from service.core.artifact_files import HOLDOUT
from service.core.errors import ArtifactMissing, StageInputInvalid, Stopped
from service.core.executor import StageCall
from service.core.manifest import Manifest
from service.core.stage_specs import (
    EvaluateStage,
    ExportStage,
    PackStage,
    SliceRef,
    StageKind,
    TokenizerStage,
)
from tests.support.tiny_export import publish_tiny_export
from tests.support.training import (
    SmallLine,
    Trainer,
    branch_stage,
    prepare_line,
    publish_documents,
    texts_of,
    trunk_stage,
)
from workers.stages import STAGES, run_stage
from workers.stages.context import StageContext
from workers.training.checkpoint import load_weights
from workers.training.model import line_model


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return Trainer(LocalArtifacts(tmp_path_factory.mktemp("artifacts")))


@pytest.fixture(scope="module")
def small(trainer: Trainer) -> SmallLine:
    return prepare_line(trainer.artifacts)


@pytest.fixture(scope="module")
def branch(trainer: Trainer, small: SmallLine) -> Manifest:
    trainer.trunk(trunk_stage(small, 5))
    return trainer.branch(branch_stage(small, 5, 4))


@pytest.fixture(scope="module")
def export(trainer: Trainer, small: SmallLine, branch: Manifest) -> Manifest:
    return trainer.run(StageKind.EXPORT, "export/e", ExportStage(line=small.line, checkpoint_key=branch.key))


def evaluation_of(export_key: str, slices: list[SliceRef], line: SmallLine, **changes: Any) -> EvaluateStage:
    values: dict[str, Any] = {
        "export_key": export_key,
        "slices": tuple(slices),
        "served_export_key": None,
        "served_slices": (),
        "sequence_length": line.line.sequence_length,
        "numerics": line.line.numerics,
    }
    return EvaluateStage(**(values | changes))


def holdouts(line: SmallLine) -> list[SliceRef]:
    return [
        SliceRef(name=f"v{n}", key=key, file=HOLDOUT, data_version=n)
        for n, key in enumerate(line.data_keys, 1)
    ]


def test_every_kind_that_an_executor_runs_has_a_function() -> None:
    assert set(STAGES) == set(StageKind) - {StageKind.GATE, StageKind.RELEASE}


def test_a_pack_has_the_training_documents_without_the_holdout(trainer: Trainer, small: SmallLine) -> None:
    manifest = trainer.artifacts.manifest(small.ledger[0].pack_key)
    assert manifest is not None
    assert manifest.result["documents"] == 54
    assert manifest.result["rows"] == small.ledger[0].rows
    assert manifest.result["tokens"] <= manifest.result["rows"] * 32
    assert manifest.result["text_bytes"] < sum(len(text.encode()) for text in texts_of(1, 60))


def test_a_pack_excludes_documents_of_slices_and_earlier_versions(trainer: Trainer, small: SmallLine) -> None:
    repeated = publish_documents(trainer.artifacts, [*texts_of(1, 60), *texts_of(8, 20)], holdout=0)
    suite = publish_documents(trainer.artifacts, texts_of(8, 10), holdout=0)

    def documents(earlier: tuple[str, ...], slices: tuple[str, ...], key: str) -> int:
        stage = PackStage(
            data_key=repeated,
            earlier_keys=earlier,
            slice_keys=slices,
            tokenizer_key=small.line.tokenizer_key,
            sequence_length=16,
        )
        return int(trainer.run(StageKind.PACK, key, stage).result["documents"])

    assert documents((), (), "pack/all") == 80
    assert documents((small.data_keys[0],), (), "pack/new") == 20
    assert documents((small.data_keys[0],), (suite,), "pack/rest") == 10
    with pytest.raises(StageInputInvalid, match="no document"):
        documents((repeated,), (), "pack/none")
    assert trainer.artifacts.manifest("pack/none") is None


def test_packs_and_tokenizers_are_reproducible_to_the_byte(
    trainer: Trainer, small: SmallLine, tmp_path: Path
) -> None:
    again = Trainer(LocalArtifacts(tmp_path))
    line = prepare_line(again.artifacts)
    for key in (line.line.tokenizer_key, line.ledger[0].pack_key, line.ledger[1].pack_key):
        first, second = trainer.artifacts.manifest(key), again.artifacts.manifest(key)
        assert first is not None
        assert second is not None
        assert first.sha256 == second.sha256
    assert line.ledger == small.ledger


def test_a_tokenizer_can_be_adopted_from_another_artifact(trainer: Trainer, small: SmallLine) -> None:
    stage = TokenizerStage(source_key=small.line.tokenizer_key)
    manifest = trainer.run(StageKind.TOKENIZER, "tokenizer/adopted", stage)
    assert manifest.result == {"vocab_size": 320, "end_of_text": 0}
    with pytest.raises(StageInputInvalid, match=r"no tokenizer\.json"):
        trainer.run(
            StageKind.TOKENIZER, "tokenizer/none", TokenizerStage(source_key=small.ledger[0].pack_key)
        )


def test_an_export_loads_in_transformers_and_gives_the_trained_models_logits(
    trainer: Trainer, small: SmallLine, branch: Manifest, export: Manifest
) -> None:
    folder = trainer.artifacts.open(export.key)
    trained = line_model(small.line, trainer.artifacts).eval()
    load_weights(trained, trainer.artifacts.open(branch.key))
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("0 so it goes", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained(ids).logits)
    assert tokenizer.model_max_length == loaded.config.max_position_embeddings == 512
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == 0
    assert loaded.dtype == torch.float32
    assert export.result["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
    generated = loaded.generate(ids, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > ids.shape[1]


def test_a_trunk_checkpoint_loads_in_transformers(trainer: Trainer, small: SmallLine) -> None:
    manifest = trainer.trunk(trunk_stage(small, 5))
    loaded = AutoModelForCausalLM.from_pretrained(trainer.artifacts.open(manifest.key))
    assert loaded.config.hidden_size == 32


def test_an_export_is_evaluated_on_every_slice(trainer: Trainer, small: SmallLine, export: Manifest) -> None:
    suite = publish_documents(trainer.artifacts, texts_of(1, 5), holdout=0)
    refs = [*holdouts(small), SliceRef(name="suite", key=suite, file="documents.ndjson.zst")]
    served = publish_tiny_export(trainer.artifacts, "export/served", seed=1)
    stage = evaluation_of(export.key, refs, small, served_export_key=served, served_slices=(refs[0],))
    result = trainer.run(StageKind.EVALUATE, "evaluate/e", stage).result
    assert [row["slice"] for row in result["evaluations"]] == ["v1", "v2", "suite"]
    assert [row["slice"] for row in result["served_evaluations"]] == ["v1"]
    for row in result["evaluations"]:
        assert 0 < row["loss"] < math.log(320)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["bits_per_byte"] > 0
        assert row["tokens"] > 0
    # The served version was not trained on such text, and has its own tokenizer.
    assert result["served_evaluations"][0]["loss"] > result["evaluations"][0]["loss"]


def test_a_loss_that_is_not_finite_is_null(trainer: Trainer, small: SmallLine) -> None:
    broken = publish_tiny_export(trainer.artifacts, "export/broken", seed=1, broken=True)
    empty = publish_documents(trainer.artifacts, ["only one"], holdout=0)
    refs = [holdouts(small)[0], SliceRef(name="empty", key=empty, file=HOLDOUT)]
    manifest = trainer.run(StageKind.EVALUATE, "evaluate/broken", evaluation_of(broken, refs, small))
    (row,) = manifest.result["evaluations"]
    assert (row["loss"], row["perplexity"], row["bits_per_byte"]) == (None, None, None)
    json.dumps(manifest.result, allow_nan=False)


def test_a_bad_spec_and_a_missing_input_raise_different_errors(trainer: Trainer, small: SmallLine) -> None:
    context = StageContext(trainer.artifacts, trainer.points.append, lambda: False)
    with pytest.raises(StageInputInvalid, match="pack"):
        run_stage(StageCall("s", 1, "pack", "pack/x", {"data_key": 1}), context)
    trunk = trunk_stage(small, 2).model_dump(mode="json")
    with pytest.raises(StageInputInvalid, match="must have a path"):
        run_stage(StageCall("s", 1, "train_branch", "branch/x", trunk), context)
    missing = ExportStage(line=small.line, checkpoint_key="branch/none")
    with pytest.raises(ArtifactMissing):
        trainer.run(StageKind.EXPORT, "export/none", missing)
    assert "export/none" not in trainer.artifacts.keys("export")


def test_a_stage_that_reads_documents_stops_on_request(trainer: Trainer, small: SmallLine) -> None:
    stage = TokenizerStage(vocab_size=300, data_key=small.data_keys[0])
    call = StageCall("s", 1, StageKind.TOKENIZER, "tokenizer/stopped", stage.model_dump(mode="json"))
    with pytest.raises(Stopped):
        run_stage(call, StageContext(trainer.artifacts, trainer.points.append, lambda: True))
    assert trainer.artifacts.manifest(call.key) is None
