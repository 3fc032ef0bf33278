"""Releases: have a version served, and the history of what was."""

from collections.abc import Sequence

from fastapi import APIRouter
from sqlalchemy.orm import Session

from api.deps import DatabaseHere, PlaceHere, told
from api.schemas.common import Page
from api.schemas.releases import NewRelease, Release
from service.release_version import release_version, roll_back
from service.store import models, releases, tables

router = APIRouter(tags=["releases"])

BY = "user"


@router.post("/models/{model}/releases", status_code=202)
def add_release(model: str, body: NewRelease, database: DatabaseHere) -> Release:
    """Roll forward or back to any version; the last one asked for wins."""
    if body.version == "previous":
        row = roll_back(database, model, by=BY, reason=body.reason)
    else:
        row = release_version(database, model, body.version, by=BY, reason=body.reason)
    return told(database, lambda session: _documents(session, model, [row])[0])


@router.get("/models/{model}/releases")
def list_releases(model: str, database: DatabaseHere, place: PlaceHere) -> Page[Release]:
    with database.reading() as session:
        model_id = models.model(session, model).id
        rows, has_more = releases.page_of_releases(session, model_id, place.after, place.limit)
        return Page(data=_documents(session, model, rows), has_more=has_more)


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
            requested_at=row.requested_at,
            released_at=row.released_at,
            retired_at=row.retired_at,
        )
        for row in rows
    ]
