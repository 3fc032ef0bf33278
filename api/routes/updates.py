"""Updates: start, list, show, cancel and retry them."""

from collections.abc import Sequence

from fastapi import APIRouter
from sqlalchemy.orm import Session

from api.deps import DatabaseDep, PageDep, read_after_commit
from api.schemas.common import Page
from api.schemas.updates import NewUpdate, Stage, StageProgress, Update
from service.core.paradigm_specs import paradigm_of
from service.core.stage_specs import TRAINING_KINDS
from service.operations.updates import (
    cancel_update,
    request_branch,
    request_one_off,
    request_update,
    retry_update,
)
from service.store import datasets, models, tables, updates

router = APIRouter(tags=["updates"])


@router.post("/models/{model}/updates", status_code=202)
def add_update(model: str, database: DatabaseDep, body: NewUpdate | None = None) -> Update:
    """Request an update to a data version.

    It can branch from an earlier checkpoint or, once, follow another paradigm.
    """
    body = body or NewUpdate()
    if body.branch_from is not None:
        row = request_branch(database, model, body.branch_from, body.decay, body.data_version)
    elif body.paradigm is not None:
        row = request_one_off(database, model, body.paradigm, body.data_version)
    else:
        row = request_update(database, model, body.data_version)
    return read_after_commit(database, lambda session: _document(session, row.id))


@router.get("/models/{model}/updates")
def list_updates(model: str, database: DatabaseDep, page: PageDep) -> Page[Update]:
    """List the updates of a model."""
    with database.reading() as session:
        model_id = models.model(session, model).id
        rows, has_more = updates.page_of_updates(session, model_id, page.after, page.limit)
        return Page(data=_documents(session, rows), has_more=has_more)


@router.get("/updates/{update}")
def show_update(update: str, database: DatabaseDep) -> Update:
    """Show an update and its stages."""
    with database.reading() as session:
        return _document(session, update)


@router.post("/updates/{update}/cancel")
def cancel(update: str, database: DatabaseDep) -> Update:
    """Cancel an update that is pending, running or failed."""
    cancel_update(database, update)
    return read_after_commit(database, lambda session: _document(session, update))


@router.post("/updates/{update}/retry")
def retry(update: str, database: DatabaseDep) -> Update:
    """Continue a failed update from its last finished stage and checkpoint."""
    retry_update(database, update)
    return read_after_commit(database, lambda session: _document(session, update))


def _document(session: Session, update_id: str) -> Update:
    return _documents(session, [updates.update(session, update_id)])[0]


def _documents(session: Session, rows: Sequence[tables.Update]) -> list[Update]:
    ids = [row.id for row in rows]
    stages = updates.stages_of_updates(session, ids)
    numbers = models.numbers_of_updates(session, ids)
    data_versions = datasets.versions_by_id(session, [row.data_version_id for row in rows])
    lines = models.by_ids(session, {row.model_id for row in rows})
    return [
        Update.from_row(
            row,
            model=lines[row.model_id].name,
            data_version=data_versions[row.data_version_id].number,
            paradigm=paradigm_of(row.paradigm),
            model_version=numbers.get(row.id),
            stages=[_stage(stage) for stage in stages[row.id]],
        )
        for row in rows
    ]


def _stage(row: tables.Stage) -> Stage:
    # A release stage stores the id of its release in ``progress``, which is not training progress.
    is_training = row.kind in TRAINING_KINDS
    progress = StageProgress.model_validate(row.progress) if row.progress and is_training else None
    return Stage.from_row(row, progress=progress)
