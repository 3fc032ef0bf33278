"""The training stages (one function for trunk, branch and other runs), and the merge of checkpoints."""

from service.core.errors import StageInputInvalid
from service.core.executor import StageCall
from service.core.manifest import Manifest
from service.core.stage_specs import MergeStage, StageKind, TrainStage
from workers.stages.context import StageContext
from workers.training.loop import train
from workers.training.merging import merged_weights, save_weights


def train_line(call: StageCall, context: StageContext) -> Manifest:
    """Train the stage. The result is described at ``workers.training.accounting``."""
    stage = TrainStage.model_validate(call.spec)
    if (stage.path is None) != (call.kind == StageKind.TRAIN_TRUNK):
        expected = "no path" if call.kind == StageKind.TRAIN_TRUNK else "a path"
        raise StageInputInvalid(f"the spec of a {call.kind} stage must have {expected}")
    return train(
        stage,
        key=call.key,
        stage_id=call.stage_id,
        artifacts=context.artifacts,
        report=context.report,
        should_stop=context.should_stop,
    )


def merge(call: StageCall, context: StageContext) -> Manifest:
    """Publish the weighted sum of checkpoints, for export. Result: ``merged``, the number of checkpoints."""
    stage = MergeStage.model_validate(call.spec)
    folders = [context.artifacts.open(key) for key in stage.checkpoint_keys]
    weights = merged_weights(folders, stage.weights, context.should_stop)
    with context.artifacts.writing(call.key) as directory:
        save_weights(weights, folders[-1], directory)
        return context.artifacts.publish(call.key, directory, {"merged": len(folders)})
