"""The stages that turn a finished checkpoint into an evaluated model version: export and evaluate."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import GenerationConfig

from service.core.executor import StageCall
from service.core.json_floats import finite_or_none
from service.core.manifest import Manifest
from service.core.stage_specs import EvaluateStage, ExportStage, SliceRef
from service.ingest.reading import read_documents
from workers.data.tokenizer import load_tokenizer
from workers.evaluation.perplexity import Evaluator, TextLoss
from workers.stages.context import StageContext
from workers.training.checkpoint import load_weights
from workers.training.model import count_parameters, line_model

EVALUATIONS = "evaluations.json"


def export(call: StageCall, context: StageContext) -> Manifest:
    """Write a checkpoint in the Hugging Face layout: fp32 weights, tokenizer and generation defaults.

    Result: ``parameters``, the total number, and ``<part>_parameters`` for embedding, output head and the
    rest.
    """
    stage = ExportStage.model_validate(call.spec)
    checkpoint = context.artifacts.open(stage.checkpoint_key)
    tokenizer = load_tokenizer(context.artifacts.open(stage.line.tokenizer_key))
    model = line_model(stage.line, context.artifacts)
    load_weights(model, checkpoint)
    max_positions = getattr(model.config, "max_position_embeddings", None)
    if max_positions is not None:
        tokenizer.model_max_length = max_positions
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    counts = asdict(count_parameters(model))
    with context.artifacts.writing(call.key) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        result = {"parameters": counts.pop("total")} | {
            f"{name}_parameters": count for name, count in counts.items()
        }
        return context.artifacts.publish(call.key, directory, result)


def evaluate(call: StageCall, context: StageContext) -> Manifest:
    """Evaluate the export on its slices, and the served version on the slices where it has no evaluation yet.

    Result: ``evaluations`` and ``served_evaluations``, one object per slice that has documents. A metric that
    is not finite is null.
    """
    stage = EvaluateStage.model_validate(call.spec)
    evaluations = {
        "evaluations": _evaluate(stage, stage.export_key, stage.slices, context),
        "served_evaluations": _evaluate(stage, stage.served_export_key, stage.served_slices, context),
    }
    with context.artifacts.writing(call.key) as directory:
        (directory / EVALUATIONS).write_text(json.dumps(evaluations, indent=1))
        return context.artifacts.publish(call.key, directory, evaluations)


def _evaluate(
    stage: EvaluateStage, export_key: str | None, slices: Sequence[SliceRef], context: StageContext
) -> list[dict[str, Any]]:
    if export_key is None or not slices:
        return []
    evaluator = Evaluator(context.artifacts.open(export_key), stage.numerics, stage.sequence_length)
    rows = []
    for ref in slices:
        documents = read_documents(context.artifacts.open(ref.key), ref.file)
        evaluation = evaluator.evaluate((document.text for document in documents), context.should_stop)
        if evaluation is not None:
            rows.append(_row(ref.name, evaluation))
    return rows


def _row(name: str, evaluation: TextLoss) -> dict[str, Any]:
    return {
        "slice": name,
        "loss": finite_or_none(evaluation.loss),
        "perplexity": finite_or_none(evaluation.perplexity),
        "bits_per_byte": finite_or_none(evaluation.bits_per_byte),
        "tokens": evaluation.tokens,
        "text_bytes": evaluation.text_bytes,
    }
