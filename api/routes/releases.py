"""Releases: have a version served, and the history of what was."""

from collections.abc import Sequence

from fastapi import APIRouter
from sqlalchemy.orm import Session

from api.deps import DatabaseHere, PlaceHere, told
from api.schemas.common import Page
from api.schemas.releases import NewRelease, Release, Replica, ReplicaVersion, Serving
from service.operations.releases import release_version, roll_back
from service.store import models, observations, releases, tables

router = APIRouter(tags=["releases"])

BY = "user"


@router.post("/models/{model}/releases", status_code=202)
def add_release(model: str, body: NewRelease, database: DatabaseHere) -> Release:
    """Roll forward or back to any version; the last one asked for wins."""
    if body.version == "previous":
        row = roll_back(database, model, by=BY, reason=body.reason, rollout=body.rollout)
    else:
        row = release_version(database, model, body.version, by=BY, reason=body.reason, rollout=body.rollout)
    return told(database, lambda session: _documents(session, model, [row])[0])


@router.get("/models/{model}/releases")
def list_releases(model: str, database: DatabaseHere, place: PlaceHere) -> Page[Release]:
    with database.reading() as session:
        model_id = models.model(session, model).id
        rows, has_more = releases.page_of_releases(session, model_id, place.after, place.limit)
        return Page(data=_documents(session, model, rows), has_more=has_more)


@router.get("/models/{model}/serving")
def get_serving(model: str, database: DatabaseHere) -> Serving:
    """What it should answer with, and what its replicas said when they were asked last, some seconds ago."""
    with database.reading() as session:
        row = models.model(session, model)
        asked, live = releases.pending(session, row.id), releases.live(session, row.id)
        seen = observations.of_model(session, row.id)
        version = None if live is None else models.version_by_id(session, live.model_version_id).number
        pending = None if asked is None else models.version_by_id(session, asked.model_version_id).number
        spec = models.serving_spec(row)
    replicas = [] if seen is None else seen[1]
    answering = seen is not None and all(report.number == version for report in replicas)
    return Serving(
        model=model,
        spec=spec,
        version=version,
        pending=pending,
        in_step=answering and (bool(replicas) or spec.replicas.min == 0),
        observed_at=None if seen is None else seen[0],
        replicas=[_replica(report) for report in replicas],
    )


def _replica(seen: observations.SeenReplica) -> Replica:
    versions = [
        ReplicaVersion(
            version=held.number,
            state=held.state,
            error=held.error,
            requests=held.requests,
            failures=held.failures,
            prompt_tokens=held.prompt_tokens,
            output_tokens=held.output_tokens,
        )
        for held in seen.versions
    ]
    return Replica(replica=seen.replica, version=seen.number, versions=versions)


def _documents(session: Session, model: str, rows: Sequence[tables.Release]) -> list[Release]:
    return [
        Release(
            id=row.id,
            model=model,
            version=models.version_by_id(session, row.model_version_id).number,
            state=row.state,
            by=row.by,
            reason=row.reason,
            error=row.error,
            rollout=row.rollout,
            trial=row.trial,
            requested_at=row.requested_at,
            begun_at=row.begun_at,
            tried_at=row.tried_at,
            promoted_at=row.promoted_at,
            released_at=row.released_at,
            retired_at=row.retired_at,
        )
        for row in rows
    ]
