"""Forgetting: the quality of every version of a model on every slice, old and new."""

from fastapi import APIRouter

from api.deps import DatabaseDep
from api.schemas.models import Forgetting
from service.store import forgetting, models

router = APIRouter(tags=["models"])


@router.get("/models/{model}/forgetting")
def show_forgetting(model: str, database: DatabaseDep) -> Forgetting:
    """Show the losses of every version on every slice.

    Columns are holdouts by data version, then uploaded slices, then any others.
    """
    with database.reading() as session:
        found = forgetting.of_model(session, models.model(session, model))
    return Forgetting.model_validate(found)
