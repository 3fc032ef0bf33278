"""Claim what is ready and have it run: at once where its artifact exists, here where it is a decision, else by the executor."""

import logging
import time
from functools import partial
from itertools import takewhile

from sqlalchemy.orm import Session

from service.artifacts import Artifacts
from service.core.errors import ArtifactCorrupt, DatabaseAway, Unavailable
from service.core.executor import Executor, Run, StageCall
from service.core.specs import ModelSpec
from service.core.stage_specs import TRAINING_KINDS, StageKind
from service.core.states import StageState
from service.orchestrator import advance
from service.orchestrator.holding import Holding
from service.orchestrator.versions import pass_judgement
from service.store import models, releases, stages, updates
from service.store.database import Database
from service.store.tables import Stage

logger = logging.getLogger(__name__)


def dispatch(database: Database, artifacts: Artifacts, executor: Executor, holding: Holding) -> bool:
    """Move every ready stage on as far as it goes now. Returns whether any moved."""
    with database.reading() as session:
        ready = list(stages.ready(session))
    moved = False
    for stage in ready:
        if stage.kind == StageKind.GATE:
            moved |= _judge(database, stage, holding)
        elif stage.kind == StageKind.RELEASE:
            moved |= _ask_for_release(database, stage, holding)
        else:
            moved |= _run(database, artifacts, executor, holding, stage)
    return moved


def run_id(stage: Stage) -> str:
    """The external name of the stage's next attempt: a duplicate means that it runs already."""
    return f"run-{stage.id}-a{stage.attempt + 1}"


def _run(
    database: Database, artifacts: Artifacts, executor: Executor, holding: Holding, stage: Stage
) -> bool:
    assert stage.key is not None
    try:
        manifest = artifacts.manifest(stage.key)
    except ArtifactCorrupt as error:
        # Nobody can use it, and it is in the way of the one that this stage makes.
        logger.error("made again: %s", error.detail)
        artifacts.unpublish([stage.key])
        manifest = None
    if manifest is not None:
        with database.transaction() as session:
            return advance.reuse(session, stage.id, manifest)
    with database.reading() as session:
        behind = _training_behind(session, stage)
    # The artifacts are asked before the transaction: an object store may take its time.
    chain = [stage.id, *(row.id for row in takewhile(partial(_is_missing, artifacts), behind))]
    began = time.monotonic()
    with database.transaction() as session:
        claimed = stages.claim(
            session,
            chain,
            owner=holding.owner,
            lease_seconds=holding.lease_seconds,
            run_id=run_id(stage),
            from_states=(StageState.READY, StageState.PENDING),
        )
        if claimed is None:
            return False
        model = models.by_id(session, updates.update(session, stage.update_id).model_id)
        workers = ModelSpec.model_validate(model.spec).training.workers
    for row in claimed:
        holding.add(row)
    run = Run(
        id=run_id(stage),
        calls=tuple(StageCall(row.id, row.attempt, row.kind, row.key or "", row.spec) for row in claimed),
        workers=workers,
    )
    if time.monotonic() - began > holding.lease_seconds:
        # We were stopped meanwhile. Whoever has taken the stage over may have found no run, and begun its next attempt.
        logger.warning("run %s: the claim has run out before it was submitted", run.id)
        return True
    try:
        executor.submit(run)
        with database.reading() as session:
            wanted = stages.any_held(session, run.id)
        if not wanted:
            logger.warning("run %s was given up before it was submitted", run.id)
            executor.cancel(run.id)
    except DatabaseAway:
        raise
    except Unavailable as error:
        # The claim stands. A poll will not know the run and hand the stage its next attempt.
        logger.warning("run %s: %s", run.id, error.detail)
    return True


def _is_missing(artifacts: Artifacts, stage: Stage) -> bool:
    """Whether nothing is published under the stage's key. What cannot be read is for the stage's own turn to tell."""
    assert stage.key is not None
    try:
        return artifacts.manifest(stage.key) is None
    except ArtifactCorrupt:
        return False


def _training_behind(session: Session, stage: Stage) -> list[Stage]:
    """Training stages that wait for this one, or for one another in turn, and for nothing else: one start-up does for all."""
    chain: list[Stage] = []
    if stage.kind not in TRAINING_KINDS:
        return chain
    for other in updates.stages(session, stage.update_id):
        last = chain[-1] if chain else stage
        waits = other.state == StageState.PENDING and other.needs == [last.id]
        if waits and other.kind in TRAINING_KINDS:
            chain.append(other)
    return chain


def _judge(database: Database, stage: Stage, holding: Holding) -> bool:
    with database.transaction() as session:
        claimed = stages.claim(
            session, [stage.id], owner=holding.owner, lease_seconds=holding.lease_seconds, run_id=None
        )
        if claimed is None:
            return False
        update = updates.update(session, stage.update_id)
        verdict = pass_judgement(session, update, claimed[0])
        end = advance.decided if verdict.passed else advance.reject
        end(session, stage.id, claimed[0].epoch, verdict.model_dump(mode="json"))
    return True


def _ask_for_release(database: Database, stage: Stage, holding: Holding) -> bool:
    with database.transaction() as session:
        claimed = stages.claim(
            session, [stage.id], owner=holding.owner, lease_seconds=holding.lease_seconds, run_id=None
        )
        if claimed is None:
            return False
        update = updates.update(session, stage.update_id)
        version = models.version_of_update(session, update.id)
        assert version is not None
        model = models.by_id(session, update.model_id)
        row = releases.request(session, model, version, by="update", reason=f"update {update.id}")
        stages.guarded_update(session, stage.id, claimed[0].epoch, progress={"release": row.id})
    holding.add(claimed[0])
    return True
