"""Claim what is ready and have it run: at once where its artifact exists, here where it is a decision, else by the executor."""

import logging
import time
from collections.abc import Sequence
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
from service.orchestrator.leases import Holding
from service.orchestrator.versions import pass_judgement
from service.store import models, releases, stages, updates
from service.store.database import Database
from service.store.tables import Stage

logger = logging.getLogger(__name__)


def dispatch(database: Database, artifacts: Artifacts, executor: Executor, holding: Holding) -> bool:
    """Move every ready stage on as far as it goes now. Returns whether any moved."""
    with database.reading() as session:
        ours = stages.ids_running_of(session, holding.owner)
        ready = list(stages.ready(session))
    moved = _take_back(
        database, executor, holding, [stage_id for stage_id in ours if stage_id not in holding.stages]
    )
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
        run = _run_of(session, run_id(stage), claimed)
    for row in claimed:
        holding.add(row)
    _submit(database, executor, holding, run, began)
    return True


def _take_back(database: Database, executor: Executor, holding: Holding, stage_ids: Sequence[str]) -> bool:
    """Go on with stages that rows say are ours, though we do not hold them: the answer to the claim was lost on its way.

    So nothing was submitted; or, where we had taken them over, it was, and submitting it again adopts it.
    """
    if not stage_ids:
        return False
    began = time.monotonic()
    with database.transaction() as session:
        rows = stages.take_back(session, stage_ids, owner=holding.owner, lease_seconds=holding.lease_seconds)
        chains: dict[str | None, list[Stage]] = {}
        for row in rows:
            chains.setdefault(row.run_id, []).append(row)
        runs = {name: _run_of(session, name, chain) for name, chain in chains.items() if name is not None}
    for name, chain in chains.items():
        if name is not None:
            logger.info("run %s is ours: the answer to its claim was lost", name)
            _submit(database, executor, holding, runs[name], began)
        for row in chain:
            holding.add(row)
    return bool(rows)


def _run_of(session: Session, name: str, claimed: Sequence[Stage]) -> Run:
    model = models.by_id(session, updates.update(session, claimed[0].update_id).model_id)
    return Run(
        id=name,
        calls=tuple(StageCall(row.id, row.attempt, row.kind, row.key or "", row.spec) for row in claimed),
        workers=ModelSpec.model_validate(model.spec).training.workers,
    )


def _submit(database: Database, executor: Executor, holding: Holding, run: Run, began: float) -> None:
    """Have a run that was claimed at ``began`` or later carried out."""
    if time.monotonic() - began > holding.lease_seconds:
        # We were stopped meanwhile. Whoever has taken the stage over may have found no run, and begun its next attempt.
        logger.warning("run %s: the claim has run out before it was submitted", run.id)
        return
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
