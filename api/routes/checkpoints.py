"""Checkpoints of a model's trunk."""

from fastapi import APIRouter

from api.deps import DatabaseDep, PageDep
from api.schemas.common import Page
from api.schemas.models import Checkpoint
from service.store import models

router = APIRouter(tags=["models"])


@router.get("/models/{model}/checkpoints")
def list_checkpoints(model: str, database: DatabaseDep, page: PageDep) -> Page[Checkpoint]:
    """List the checkpoints of the model's trunk, which updates can branch from."""
    with database.reading() as session:
        model_id = models.model(session, model).id
        rows, has_more = models.page_of_checkpoints(session, model_id, page.after, page.limit)
    return Page(data=[Checkpoint.from_row(row, kind="trunk") for row in rows], has_more=has_more)
