"""STAGES maps each stage kind to its function: spec in, one artifact out, under the stage's key."""

from collections.abc import Callable, Mapping

from pydantic import ValidationError
from transformers.utils.logging import disable_progress_bar

from service.core.errors import StageInputInvalid
from service.core.executor import StageCall
from service.core.manifest import Manifest
from service.core.stage_specs import TRAINING_KINDS, StageKind
from workers.stages.context import StageContext
from workers.stages.data import pack, tokenizer
from workers.stages.finish import evaluate, export
from workers.stages.training import merge, train_line
from workers.training.ranks import Ranks

StageFunction = Callable[[StageCall, StageContext], Manifest]

STAGES: Mapping[StageKind, StageFunction] = {
    StageKind.TOKENIZER: tokenizer,
    StageKind.PACK: pack,
    StageKind.TRAIN_TRUNK: train_line,
    StageKind.TRAIN_BRANCH: train_line,
    StageKind.TRAIN: train_line,
    StageKind.MERGE: merge,
    StageKind.EXPORT: export,
    StageKind.EVALUATE: evaluate,
}


def run_stage(call: StageCall, context: StageContext) -> Manifest:
    """Run the stage unless its artifact exists, and return the artifact's manifest.

    Every rank of a process group calls this for a training stage. Raises the errors below StageError.
    """
    kind = StageKind(call.kind)
    published = context.artifacts.manifest(call.key)
    if kind in TRAINING_KINDS:
        # The ranks must agree: if one returned early, the others would wait forever.
        device = call.spec["line"]["numerics"]["device"]
        exists = Ranks.current(device).from_first(lambda: published is not None)
        published = context.artifacts.manifest(call.key) if exists else None
    if published is not None:
        return published
    disable_progress_bar()
    try:
        return STAGES[kind](call, context)
    except ValidationError as error:
        raise StageInputInvalid(f"{call.kind}: {error}") from error
