"""Training metrics of a stage."""

from typing import Annotated

from fastapi import APIRouter, Query

from api.deps import DatabaseDep
from api.schemas.updates import MetricPoint, Metrics
from service.core.errors import NotFound
from service.store import updates
from service.store.metrics import thinned_points

router = APIRouter(tags=["updates"])

MAX_POINTS = 2000


@router.get("/updates/{update}/metrics")
def show_metrics(
    update: str, stage: Annotated[str, Query(description="id of a training stage")], database: DatabaseDep
) -> Metrics:
    """List a point per step, or 2,000 evenly spaced ones if there are more. Keeps the first and the last."""
    with database.reading() as session:
        row = updates.update(session, update)
        found = next((other for other in updates.stages(session, row.id) if other.id == stage), None)
        if found is None:
            raise NotFound(f"update {update} has no stage {stage!r}")
        points = thinned_points(session, found, MAX_POINTS)
    return Metrics(data=[MetricPoint.model_validate(point) for point in points])
