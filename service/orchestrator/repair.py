"""Artifacts that turn out to be damaged are made again by the stages that made them, and history says so.

A damaged artifact is found before it is used, by whoever opens it; the attempt that did so fails. Here its inputs are looked
at: what is damaged or gone is unpublished, so that nobody takes it for made, its stage becomes ready again, and the failed
one waits for it. What no stage of the update has made (data, another update's checkpoint) cannot be made again here.
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

# Errors of an attempt that say that an input of its stage may be damaged.
DAMAGE_CODES = frozenset({ArtifactCorrupt.code, ArtifactMissing.code})


def damaged_inputs(database: Database, artifacts: Artifacts, stage_id: str) -> list[str]:
    """Ids of the stages that made what is damaged of the stage's inputs, which nobody finds published any more.

    Reads all of the inputs. Raises Unavailable.
    """
    with database.reading() as session:
        stage = stages.get(session, stage_id)
        read = set(parse_stage_spec(stage.kind, stage.spec).artifact_keys())
        made = {
            row.id: row.key
            for row in updates.stages(session, stage.update_id)
            if row.key in read and row.state == StageState.SUCCEEDED
        }
    return [row_id for row_id, key in made.items() if key and _unpublish_if_damaged(artifacts, key)]


def make_again(session: Session, stage_id: str, epoch: int, made_by: Sequence[str], error: RunError) -> bool:
    """Have the stages in ``made_by`` run again, and the one that is held wait for them. False where it has no try left.

    Raises Fenced where the stage is not held under ``epoch``.
    """
    stage = stages.get(session, stage_id)
    if not retry.worth_another(stage.attempt, stage.max_attempts, retryable=True):
        return False
    # A training stage reads packs, and needs what has read them before it.
    needs = sorted({*stage.needs, *made_by})
    written, wasted = stages.lost_attempt(stage, error, now(session))
    stages.guarded_update(
        session,
        stage_id,
        epoch,
        state=StageState.PENDING,
        needs=needs,
        error=written,
        wasted_seconds=wasted,
        **stages.LET_GO,
    )
    for maker_id in made_by:
        stages.reopen_succeeded(session, maker_id)
        events.append(session, "stage.made_again", stage=maker_id, update=stage.update_id, for_stage=stage_id)
    return True


def _unpublish_if_damaged(artifacts: Artifacts, key: str) -> bool:
    try:
        artifacts.open(key)
    except (ArtifactCorrupt, ArtifactMissing) as error:
        logger.error("made again: %s", error.detail)
        artifacts.unpublish([key])
        return True
    return False
