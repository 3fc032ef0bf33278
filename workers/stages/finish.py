"""The stages from a finished checkpoint to a measured model version."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import GenerationConfig

from service.core.executor import StageCall
from service.core.manifest import Manifest
from service.core.stage_specs import EvaluateStage, ExportStage, SliceRef
from service.ingest.reading import read_documents
from workers.data.tokenizer import load_tokenizer
from workers.evaluation.perplexity import Evaluation, Evaluator
from workers.stages.context import StageContext
from workers.training.checkpoint import load_weights
from workers.training.model import count_parameters, line_model

EVALUATIONS = "evaluations.json"


def export(call: StageCall, context: StageContext) -> Manifest:
    """Write a checkpoint as transformers loads it, with tokenizer and generation defaults, weights in fp32.

    Result: ``parameters`` in all, and how many of them embed and give the logits.
    """
    stage = ExportStage.model_validate(call.spec)
    checkpoint = context.artifacts.open(stage.checkpoint_key)
    tokenizer = load_tokenizer(context.artifacts.open(stage.line.tokenizer_key))
    model = line_model(stage.line, context.artifacts)
    load_weights(model, checkpoint)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None:
        tokenizer.model_max_length = longest
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
    """Measure the export on its slices, and the served version on those where it has not been measured yet.

    Result: ``evaluations`` and ``served_evaluations``, one object a slice; a slice without documents has
    none, and a loss that is not finite is null.
    """
    stage = EvaluateStage.model_validate(call.spec)
    measured = {
        "evaluations": _measure(stage, stage.export_key, stage.slices, context),
        "served_evaluations": _measure(stage, stage.served_export_key, stage.served_slices, context),
    }
    with context.artifacts.writing(call.key) as directory:
        (directory / EVALUATIONS).write_text(json.dumps(measured, indent=1))
        return context.artifacts.publish(call.key, directory, measured)


def _measure(
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


def _row(name: str, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "slice": name,
        "loss": _finite(evaluation.loss),
        "perplexity": _finite(evaluation.perplexity),
        "bits_per_byte": _finite(evaluation.bits_per_byte),
        "tokens": evaluation.tokens,
        "text_bytes": evaluation.text_bytes,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
