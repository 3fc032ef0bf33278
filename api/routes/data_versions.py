"""Data versions: register by streaming a body, list, show."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session

from api.deps import DatabaseDep, Number, PageDep, ServicesDep, in_thread
from api.schemas.common import Page, Text
from api.schemas.data import AffectedVersion, DataVersion, Excluded, Exclusion, LabelledSource
from api.upload import openapi_body, receive_upload
from service.ingest.stream import in_worker
from service.operations.exclusion import exclude_version
from service.registration.data_versions import register_version
from service.store import datasets, tables, updates
from service.store.database import Database

router = APIRouter(tags=["data"])


@router.post(
    "/datasets/{dataset}/versions",
    status_code=201,
    responses={200: {"model": DataVersion, "description": "The dataset already has this content: its row"}},
    openapi_extra=openapi_body(LabelledSource),
)
async def add_data_version(
    dataset: str,
    request: Request,
    response: Response,
    services: ServicesDep,
    label: Annotated[Text | None, Query()] = None,
) -> DataVersion:
    """Register the body, or the source that a JSON body names, as the next data version.

    Bad content is rejected with 422, and nothing is stored.
    """
    database = services.database
    await in_thread(partial(_check_dataset, database, dataset))
    async with receive_upload(request, services, LabelledSource) as received:
        if received.source is not None and received.source.label is not None:
            label = received.source.label
        register = partial(
            register_version, database, services.hashes, dataset, received.ingest, received.body, label=label
        )
        registered = await in_worker(register, received.threads)
    response.status_code = 201 if registered.created else 200
    return _document(dataset, registered.row, registered.updates)


@router.get("/datasets/{dataset}/versions")
def list_data_versions(dataset: str, database: DatabaseDep, page: PageDep) -> Page[DataVersion]:
    """List the data versions of a dataset, including excluded ones."""
    with database.reading() as session:
        row = datasets.dataset(session, dataset)
        rows, has_more = datasets.page_of_versions(session, row.id, page.after, page.limit)
        return Page(data=_documents(session, dataset, rows), has_more=has_more)


@router.get("/datasets/{dataset}/versions/{number}")
def show_data_version(dataset: str, number: Number, database: DatabaseDep) -> DataVersion:
    """Show a data version."""
    with database.reading() as session:
        row = datasets.version(session, datasets.dataset(session, dataset).id, number)
        return _documents(session, dataset, [row])[0]


@router.post("/datasets/{dataset}/versions/{number}/exclude")
def exclude_data_version(dataset: str, number: Number, database: DatabaseDep, body: Exclusion) -> Excluded:
    """Exclude a data version from training.

    Models rewind to before it at their next update. Served versions stay served until they are replaced.
    """
    affected = exclude_version(database, dataset, number, body.reason)
    return Excluded(affected_versions=[AffectedVersion.model_validate(version) for version in affected])


def _check_dataset(database: Database, dataset: str) -> None:
    with database.reading() as session:
        datasets.dataset(session, dataset)


def _documents(session: Session, dataset: str, rows: Sequence[tables.DataVersion]) -> list[DataVersion]:
    update_ids = updates.ids_by_data_version(session, [row.id for row in rows])
    return [_document(dataset, row, update_ids.get(row.id, [])) for row in rows]


def _document(dataset: str, row: tables.DataVersion, update_ids: list[str]) -> DataVersion:
    state = "ready" if row.excluded_at is None else "excluded"
    return DataVersion.from_row(row, dataset=dataset, state=state, updates=update_ids)
