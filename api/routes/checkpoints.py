"""Checkpoints of a model's trunk."""

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
    return Page(data=[Checkpoint.from_row(row, kind="trunk") for row in rows], has_more=has_more)
