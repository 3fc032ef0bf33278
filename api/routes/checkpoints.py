"""The trunk: the checkpoints that a model's updates leave it at."""

from fastapi import APIRouter

from api.deps import DatabaseHere, PlaceHere
from api.schemas.common import Page
from api.schemas.models import Checkpoint
from service.store import models

router = APIRouter(tags=["models"])


@router.get("/models/{model}/checkpoints")
def list_checkpoints(model: str, database: DatabaseHere, place: PlaceHere) -> Page[Checkpoint]:
    with database.reading() as session:
        model_id = models.model(session, model).id
        rows, has_more = models.page_of_checkpoints(session, model_id, place.after, place.limit)
    data = [
        Checkpoint(
            id=row.id,
            kind="trunk",
            state=row.state,
            step=row.step,
            data_version=row.data_version,
            sha256=row.sha256,
            bytes=row.bytes,
            created_at=row.created_at,
        )
        for row in rows
    ]
    return Page(data=data, has_more=has_more)
