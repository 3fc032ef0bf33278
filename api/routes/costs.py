"""The cost of a model line, compared with other ways of keeping a model up to date."""

from typing import Annotated

from fastapi import APIRouter, Query

from api.deps import DatabaseDep
from api.schemas.costs import Costs
from service.operations.costs import report_costs

router = APIRouter(tags=["models"])


@router.get("/models/{model}/costs")
def show_costs(
    model: str,
    database: DatabaseDep,
    tokens: Annotated[
        int | None, Query(ge=1, le=1 << 50, description="size of the next version, for the forecast")
    ] = None,
) -> Costs:
    """Show the cost of each version and of the line, and a forecast for the next version.

    By default the forecast assumes as much new data as the newest version had.
    """
    return Costs.model_validate(report_costs(database, model, next_tokens=tokens))
