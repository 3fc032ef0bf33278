"""Repair: damaged artifacts are made again by the stages that made them, and the events record it.

Every reader verifies an artifact before it uses it, so damage fails the reader's attempt. Then this module
checks that attempt's inputs: it unpublishes each one that is damaged or missing, makes its stage ready again,
and has the failed stage wait for it. It cannot repair an artifact that no stage of the update made: data, or
another update's checkpoint.
"""

import logging
from collections.abc import Sequence

from sqlalchemy.orm import Session

from service.artifacts import Artifacts
from service.core import retry
from service.core.errors import ArtifactCorrupt, ArtifactMissing
from service.core.executor import RunError
from service.core.stage_specs import parse_stage_spec
from service.core.states import StageState
from service.store import events, stages, updates
from service.store.database import Database, now

logger = logging.getLogger(__name__)

# Errors after which the inputs of a stage are checked.
DAMAGE_CODES = frozenset({ArtifactCorrupt.code, ArtifactMissing.code})


def unpublish_damaged_inputs(database: Database, artifacts: Artifacts, stage_id: str) -> list[str]:
    """Unpublish the damaged inputs of a stage, and return the ids of the stages that made them.

    Reads every input in full. Raises Unavailable.
    """
    with database.reading() as session:
        stage = stages.get(session, stage_id)
        inputs = set(parse_stage_spec(stage.kind, stage.spec).artifact_keys())
        makers = {
            row.id: row.key
            for row in updates.stages(session, stage.update_id)
            if row.key in inputs and row.state == StageState.SUCCEEDED
        }
    return [row_id for row_id, key in makers.items() if key and _unpublish_if_damaged(artifacts, key)]


def rerun_makers(
    session: Session, stage_id: str, epoch: int, maker_ids: Sequence[str], error: RunError
) -> bool:
    """Make the stages ``maker_ids`` ready again, and have the held stage wait for them.

    Returns False if the held stage has no attempt left. Raises Fenced if it is not held under ``epoch``.
    """
    stage = stages.get(session, stage_id)
    if not retry.worth_another(stage.attempt, stage.max_attempts, retryable=True):
        return False
    # A training stage reads packs that it does not name as needs: the training stage before it needs them.
    needs = sorted({*stage.needs, *maker_ids})
    error_document, wasted_seconds = stages.lost_attempt(stage, error, now(session))
    stages.guarded_update(
        session,
        stage_id,
        epoch,
        state=StageState.PENDING,
        needs=needs,
        error=error_document,
        wasted_seconds=wasted_seconds,
        **stages.RELEASED_CLAIM,
    )
    for maker_id in maker_ids:
        stages.reopen_succeeded(session, maker_id)
        events.append(session, "stage.made_again", stage=maker_id, update=stage.update_id, for_stage=stage_id)
    return True


def _unpublish_if_damaged(artifacts: Artifacts, key: str) -> bool:
    try:
        artifacts.open(key)
    except (ArtifactCorrupt, ArtifactMissing) as error:
        logger.error("unpublished, to be made again: %s", error.detail)
        artifacts.unpublish([key])
        return True
    return False
