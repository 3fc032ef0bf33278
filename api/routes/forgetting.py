"""The forgetting matrix: how well every version does on every slice, old and new."""

from fastapi import APIRouter

from api.deps import DatabaseHere
from api.schemas.models import Forgetting
from service.store import datasets, models

router = APIRouter(tags=["models"])


@router.get("/models/{model}/forgetting")
def show_forgetting(model: str, database: DatabaseHere) -> Forgetting:
    """Slices in order of data version, given ones last; whatever else was measured on comes after them."""
    with database.reading() as session:
        row = models.model(session, model)
        versions = models.versions(session, row.id)
        newest = max((version.data_version for version in versions), default=0)
        known = [ref.name for ref in datasets.slice_refs(session, row.dataset_id, newest)]
    measured = {
        version.number: {item["slice"]: item["loss"] for item in version.evaluations} for version in versions
    }
    seen = {name: None for losses in measured.values() for name in losses}
    slices = [name for name in known if name in seen] + [name for name in seen if name not in known]
    return Forgetting(
        slices=slices,
        versions=list(measured),
        loss=[[losses.get(name) for name in slices] for losses in measured.values()],
    )
