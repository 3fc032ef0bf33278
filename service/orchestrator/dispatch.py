"""Claim ready stages: reuse their artifact if it exists, decide gates and releases here, run the rest."""

import logging
import time
from collections.abc import Sequence
from functools import partial
from itertools import takewhile

from sqlalchemy.orm import Session

from service.artifacts import Artifacts
from service.core.errors import ArtifactCorrupt, DatabaseUnavailable, Unavailable
from service.core.executor import Executor, Run, StageCall
from service.core.specs import ModelSpec
from service.core.stage_specs import TRAINING_KINDS, StageKind
from service.core.states import StageState
from service.orchestrator import advance
from service.orchestrator.leases import LeaseTable
from service.orchestrator.versions import judge_candidate
from service.store import models, releases, stages, updates
from service.store.database import Database
from service.store.tables import Stage

logger = logging.getLogger(__name__)


def dispatch(database: Database, artifacts: Artifacts, executor: Executor, leases: LeaseTable) -> bool:
    """Advance every ready stage as far as possible. Returns whether any changed."""
    with database.reading() as session:
        owned = stages.ids_running_of(session, leases.owner)
        ready = list(stages.ready(session))
    orphans = [stage_id for stage_id in owned if stage_id not in leases.stages]
    moved = _reclaim(database, executor, leases, orphans)
    for stage in ready:
        if stage.kind in (StageKind.GATE, StageKind.RELEASE):
            moved |= _decide(database, leases, stage)
        else:
            moved |= _run(database, artifacts, executor, leases, stage)
    return moved


def run_id(stage: Stage) -> str:
    """The external name of the stage's next attempt.

    The executor rejects a duplicate id: that run already exists.
    """
    return f"run-{stage.id}-a{stage.attempt + 1}"


def _run(
    database: Database, artifacts: Artifacts, executor: Executor, leases: LeaseTable, stage: Stage
) -> bool:
    """Succeed at once if the stage's artifact exists.

    Otherwise claim the stage, with the training stages behind it, as a run.
    """
    assert stage.key is not None
    try:
        manifest = artifacts.manifest(stage.key)
    except ArtifactCorrupt as error:
        # Unpublish it, because it is useless and would block the artifact that this stage makes.
        logger.error("unpublished, to be made again: %s", error.detail)
        artifacts.unpublish([stage.key])
        manifest = None
    if manifest is not None:
        with database.transaction() as session:
            return advance.reuse(session, stage.id, manifest)
    with database.reading() as session:
        followers = _training_after(session, stage)
    # Look for artifacts outside the transaction, because an object store may be slow.
    chain = [stage.id, *(row.id for row in takewhile(partial(_is_missing, artifacts), followers))]
    began = time.monotonic()
    with database.transaction() as session:
        claimed = stages.claim(
            session,
            chain,
            owner=leases.owner,
            lease_seconds=leases.lease_seconds,
            run_id=run_id(stage),
            from_states=(StageState.READY, StageState.PENDING),
        )
        if claimed is None:
            return False
        run = _run_of(session, run_id(stage), claimed)
    for row in claimed:
        leases.add(row)
    _submit(database, executor, leases, run, began)
    return True


def _reclaim(database: Database, executor: Executor, leases: LeaseTable, stage_ids: Sequence[str]) -> bool:
    """Resume stages that this orchestrator owns but has no lease for in memory.

    That happens if the database's response to a claim was lost. After a claim, nothing has been submitted yet;
    after a takeover, the run exists and submitting it again adopts it.
    """
    if not stage_ids:
        return False
    began = time.monotonic()
    with database.transaction() as session:
        rows = stages.reclaim(session, stage_ids, owner=leases.owner, lease_seconds=leases.lease_seconds)
        chains: dict[str | None, list[Stage]] = {}
        for row in rows:
            chains.setdefault(row.run_id, []).append(row)
        runs = {name: _run_of(session, name, chain) for name, chain in chains.items() if name is not None}
    for name, chain in chains.items():
        if name is not None:
            logger.info("resuming run %s: the answer to its claim was lost", name)
            _submit(database, executor, leases, runs[name], began)
        for row in chain:
            leases.add(row)
    return bool(rows)


def _run_of(session: Session, name: str, claimed: Sequence[Stage]) -> Run:
    model = models.by_id(session, updates.update(session, claimed[0].update_id).model_id)
    return Run(
        id=name,
        calls=tuple(StageCall(row.id, row.attempt, row.kind, row.key or "", row.spec) for row in claimed),
        workers=ModelSpec.model_validate(model.spec).training.workers,
    )


def _submit(database: Database, executor: Executor, leases: LeaseTable, run: Run, began: float) -> None:
    """Submit a run whose stages were claimed at the monotonic time ``began`` or later."""
    if time.monotonic() - began > leases.lease_seconds:
        # This process was suspended. Another one may have taken the stage over, found no run and begun the
        # next attempt.
        logger.warning("run %s: its lease expired before it was submitted", run.id)
        return
    try:
        executor.submit(run)
        with database.reading() as session:
            is_needed = stages.any_running(session, run.id)
        if not is_needed:
            logger.warning("run %s was cancelled before it was submitted", run.id)
            executor.cancel(run.id)
    except DatabaseUnavailable:
        raise
    except Unavailable as error:
        # The claim stands. The next poll reports the run as lost, and the stage gets its next attempt.
        logger.warning("run %s: %s", run.id, error.detail)


def _is_missing(artifacts: Artifacts, stage: Stage) -> bool:
    """Whether nothing is published under the stage's key.

    A corrupt manifest is left for the stage's own dispatch.
    """
    assert stage.key is not None
    try:
        return artifacts.manifest(stage.key) is None
    except ArtifactCorrupt:
        return False


def _training_after(session: Session, stage: Stage) -> list[Stage]:
    """The chain of training stages that directly follow this one, which can share its run.

    Each of them needs only the one before it.
    """
    chain: list[Stage] = []
    if stage.kind not in TRAINING_KINDS:
        return chain
    for other in updates.stages(session, stage.update_id):
        last = chain[-1] if chain else stage
        waits_for_last = other.state == StageState.PENDING and other.needs == [last.id]
        if waits_for_last and other.kind in TRAINING_KINDS:
            chain.append(other)
    return chain


def _decide(database: Database, leases: LeaseTable, stage: Stage) -> bool:
    """Claim a gate or release stage and carry it out, in one transaction."""
    with database.transaction() as session:
        claimed = stages.claim(
            session, [stage.id], owner=leases.owner, lease_seconds=leases.lease_seconds, run_id=None
        )
        if claimed is None:
            return False
        [row] = claimed
        if row.kind == StageKind.GATE:
            _judge(session, row)
        else:
            _request_release(session, row)
    if row.kind == StageKind.RELEASE:  # it runs on until its release has ended
        leases.add(row)
    return True


def _judge(session: Session, stage: Stage) -> None:
    verdict = judge_candidate(session, updates.update(session, stage.update_id), stage)
    end = advance.succeed_decision if verdict.passed else advance.reject
    end(session, stage.id, stage.epoch, verdict.model_dump(mode="json"))


def _request_release(session: Session, stage: Stage) -> None:
    update = updates.update(session, stage.update_id)
    version = models.version_of_update(session, update.id)
    assert version is not None
    model = models.by_id(session, update.model_id)
    release = releases.request(session, model, version, by="update", reason=f"update {update.id}")
    stages.guarded_update(session, stage.id, stage.epoch, progress={"release": release.id})
