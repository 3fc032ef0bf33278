"""What a model forgot: how well every version does on every slice, old and new."""

from fastapi import APIRouter

from api.deps import DatabaseHere
from api.schemas.models import Forgetting
from service.store import forgetting, models

router = APIRouter(tags=["models"])


@router.get("/models/{model}/forgetting")
def show_forgetting(model: str, database: DatabaseHere) -> Forgetting:
    """Slices in order of data version, given ones last; whatever else was measured on comes after them."""
    with database.reading() as session:
        found = forgetting.of_model(session, models.model(session, model))
    return Forgetting.model_validate(found, from_attributes=True)
