"""Models: create, list, show and change them."""

from collections.abc import Sequence

from fastapi import APIRouter
from sqlalchemy.orm import Session

from api.deps import DatabaseDep, PageDep, ServicesDep, read_after_commit
from api.schemas.common import Page
from api.schemas.models import Model, ModelChanges, ModelState
from service.core.specs import ModelSpec
from service.operations.models import change_model, create_model
from service.store import models, tables

router = APIRouter(tags=["models"])


@router.post("/models", status_code=201)
def add_model(body: ModelSpec, services: ServicesDep) -> Model:
    """Create a model that trains on a dataset. Only ``name`` and ``dataset`` are required."""
    row = create_model(services.database, services.artifacts, services.settings.import_roots, body)
    return read_after_commit(services.database, lambda session: _documents(session, [row])[0])


@router.get("/models")
def list_models(database: DatabaseDep, page: PageDep) -> Page[Model]:
    """List the models."""
    with database.reading() as session:
        rows, has_more = models.page_of_models(session, page.after, page.limit)
        return Page(data=_documents(session, rows), has_more=has_more)


@router.get("/models/{model}")
def show_model(model: str, database: DatabaseDep) -> Model:
    """Show a model: its specification, with defaults filled in, and its state."""
    with database.reading() as session:
        return _documents(session, [models.model(session, model)])[0]


@router.patch("/models/{model}")
def patch_model(model: str, body: ModelChanges, database: DatabaseDep) -> Model:
    """Change a model's gate, serving or automation, or where its training runs. Other fields are fixed (409)."""
    row = change_model(database, model, body.model_dump(exclude_unset=True))
    return read_after_commit(database, lambda session: _documents(session, [row])[0])


def _documents(session: Session, rows: Sequence[tables.Model]) -> list[Model]:
    statuses = models.statuses(session, [row.id for row in rows])
    return [
        Model(
            **row.spec,
            id=row.id,
            state=ModelState.from_row(statuses[row.id], update=statuses[row.id].update_id),
            created_at=row.created_at,
        )
        for row in rows
    ]
