"""The training curve of a stage."""

from typing import Annotated

from fastapi import APIRouter, Query

from api.deps import DatabaseHere
from api.schemas.updates import MetricPoint, Metrics
from service.core.errors import NotFound
from service.store import updates
from service.store.metrics import thinned_points

router = APIRouter(tags=["updates"])

MAX_POINTS = 2000


@router.get("/updates/{update}/metrics")
def show_metrics(
    update: str, stage: Annotated[str, Query(description="id of a training stage")], database: DatabaseHere
) -> Metrics:
    """One point a step; above 2,000, that many of them, spread evenly, the first and the last among them."""
    with database.reading() as session:
        row = updates.update(session, update)
        found = next((other for other in updates.stages(session, row.id) if other.id == stage), None)
        if found is None:
            raise NotFound(f"update {update} has no stage {stage!r}")
        points = thinned_points(session, found, MAX_POINTS)
    data = [
        MetricPoint(
            step=point.step,
            loss=point.loss,
            learning_rate=point.learning_rate,
            grad_norm=point.grad_norm,
            tokens_per_second=point.tokens_per_second,
        )
        for point in points
    ]
    return Metrics(data=data)
