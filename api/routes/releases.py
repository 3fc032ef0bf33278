"""Releases: request that a version be served, list the history, and show what is served."""

from collections.abc import Sequence

from fastapi import APIRouter
from sqlalchemy.orm import Session

from api.deps import DatabaseDep, PageDep, read_after_commit
from api.schemas.common import Page
from api.schemas.releases import NewRelease, Release, ReplicaStatus, ReplicaVersion, ServingStatus
from service.operations.releases import release_version, roll_back
from service.store import models, observations, releases, tables

router = APIRouter(tags=["releases"])

BY = "user"


@router.post("/models/{model}/releases", status_code=202)
def add_release(model: str, body: NewRelease, database: DatabaseDep) -> Release:
    """Release an exported version, newer or older, or the previous one. The latest request wins."""
    if body.version == "previous":
        row = roll_back(database, model, by=BY, reason=body.reason, rollout=body.rollout)
    else:
        row = release_version(database, model, body.version, by=BY, reason=body.reason, rollout=body.rollout)
    return read_after_commit(database, lambda session: _documents(session, model, [row])[0])


@router.get("/models/{model}/releases")
def list_releases(model: str, database: DatabaseDep, page: PageDep) -> Page[Release]:
    """List the releases of a model."""
    with database.reading() as session:
        model_id = models.model(session, model).id
        rows, has_more = releases.page_of_releases(session, model_id, page.after, page.limit)
        return Page(data=_documents(session, model, rows), has_more=has_more)


@router.get("/models/{model}/serving")
def get_serving(model: str, database: DatabaseDep) -> ServingStatus:
    """Show the version that should be served, and what the replicas reported a few seconds ago."""
    with database.reading() as session:
        row = models.model(session, model)
        asked_for, live = releases.pending(session, row.id), releases.live(session, row.id)
        observation = observations.of_model(session, row.id)
        version = None if live is None else models.version_by_id(session, live.model_version_id).number
        pending = (
            None if asked_for is None else models.version_by_id(session, asked_for.model_version_id).number
        )
        spec = models.serving_spec(row)
    observed_at, replicas = observation if observation is not None else (None, [])
    all_answer = observation is not None and all(replica.number == version for replica in replicas)
    return ServingStatus(
        model=model,
        spec=spec,
        version=version,
        pending=pending,
        in_step=all_answer and (bool(replicas) or spec.replicas.min == 0),
        observed_at=observed_at,
        replicas=[_replica(replica) for replica in replicas],
    )


def _replica(replica: observations.ObservedReplica) -> ReplicaStatus:
    versions = [ReplicaVersion.from_row(version, version=version.number) for version in replica.versions]
    return ReplicaStatus(replica=replica.replica, version=replica.number, versions=versions)


def _documents(session: Session, model: str, rows: Sequence[tables.Release]) -> list[Release]:
    return [
        Release.from_row(row, model=model, version=models.version_by_id(session, row.model_version_id).number)
        for row in rows
    ]
