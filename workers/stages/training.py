"""The training stages: trunk and branch are one function."""

from service.artifacts import Manifest
from service.core.errors import StageInputInvalid
from service.core.executor import StageCall
from service.core.stage_specs import StageKind, TrainStage
from workers.stages.context import StageContext
from workers.training.loop import train


def train_line(call: StageCall, context: StageContext) -> Manifest:
    """Result: see ``workers.training.loop.train``."""
    stage = TrainStage.model_validate(call.spec)
    if (stage.branch is not None) != (call.kind == StageKind.TRAIN_BRANCH):
        raise StageInputInvalid(f"the spec of a {call.kind} stage has the wrong path")
    return train(
        stage,
        key=call.key,
        stage_id=call.stage_id,
        artifacts=context.artifacts,
        report=context.report,
        should_stop=context.should_stop,
    )
