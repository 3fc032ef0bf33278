"""What a model line has cost, beside what other ways of keeping it up to date would have."""

from typing import Annotated

from fastapi import APIRouter, Query

from api.deps import DatabaseHere
from api.schemas.costs import Costs
from service.operations.costs import report_costs

router = APIRouter(tags=["models"])


@router.get("/models/{model}/costs")
def show_costs(
    model: str,
    database: DatabaseHere,
    tokens: Annotated[
        int | None, Query(ge=1, le=1 << 50, description="how many the next version has, for the forecast")
    ] = None,
) -> Costs:
    return Costs.model_validate(report_costs(database, model, next_tokens=tokens), from_attributes=True)
