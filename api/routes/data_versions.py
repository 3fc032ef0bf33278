"""Data versions: register by streaming a body, list, show."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session

from api.deps import DatabaseHere, Number, PlaceHere, ServicesHere
from api.schemas.common import Page, Text
from api.schemas.data import AffectedVersion, DataVersion, Excluded, Exclusion, LabelledSource
from api.upload import Received, openapi_body, registered
from service.operations.exclusion import exclude_version
from service.store import datasets, tables, updates
from service.store.database import Database
from service.version_rounds import RegisteredVersion

router = APIRouter(tags=["data"])


@router.post(
    "/datasets/{dataset}/versions",
    status_code=201,
    responses={200: {"model": DataVersion, "description": "The same content is there already: its row"}},
    openapi_extra=openapi_body(LabelledSource),
)
async def add_data_version(
    dataset: str,
    request: Request,
    response: Response,
    services: ServicesHere,
    label: Annotated[Text | None, Query()] = None,
) -> DataVersion:
    """The body is the data itself, streamed, or JSON that names it. Bad content: 422, nothing is stored."""
    database = services.database

    def register(taken_in: Received[LabelledSource]) -> RegisteredVersion:
        source = taken_in.source
        return services.versions.register(
            dataset,
            taken_in.ingest,
            taken_in.body,
            label=label if source is None or source.label is None else source.label,
        )

    result = await registered(request, services, LabelledSource, lambda: _check(database, dataset), register)
    response.status_code = 201 if result.created else 200
    return _document(dataset, result.row, result.updates)


@router.get("/datasets/{dataset}/versions")
def list_data_versions(dataset: str, database: DatabaseHere, place: PlaceHere) -> Page[DataVersion]:
    with database.reading() as session:
        row = datasets.dataset(session, dataset)
        rows, has_more = datasets.page_of_versions(session, row.id, place.after, place.limit)
        return Page(data=_documents(session, dataset, rows), has_more=has_more)


@router.get("/datasets/{dataset}/versions/{number}")
def show_data_version(dataset: str, number: Number, database: DatabaseHere) -> DataVersion:
    with database.reading() as session:
        row = datasets.version(session, datasets.dataset(session, dataset).id, number)
        return _documents(session, dataset, [row])[0]


@router.post("/datasets/{dataset}/versions/{number}/exclude")
def exclude_data_version(dataset: str, number: Number, database: DatabaseHere, body: Exclusion) -> Excluded:
    """Models rewind to before it at their next update; what is served stays until it is released over."""
    affected = exclude_version(database, dataset, number, body.reason)
    return Excluded(
        affected_versions=[
            AffectedVersion(model=row.model, number=row.number, state=row.state) for row in affected
        ]
    )


def _check(database: Database, dataset: str) -> None:
    with database.reading() as session:
        datasets.dataset(session, dataset)


def _documents(session: Session, dataset: str, rows: Sequence[tables.DataVersion]) -> list[DataVersion]:
    update_ids = updates.ids_by_data_version(session, [row.id for row in rows])
    return [_document(dataset, row, update_ids.get(row.id, [])) for row in rows]


def _document(dataset: str, row: tables.DataVersion, update_ids: list[str]) -> DataVersion:
    return DataVersion(
        id=row.id,
        dataset=dataset,
        number=row.number,
        label=row.label,
        state="ready" if row.excluded_at is None else "excluded",
        excluded_at=row.excluded_at,
        excluded_reason=row.excluded_reason,
        sha256=row.sha256,
        bytes=row.bytes,
        documents=row.documents,
        duplicates=row.duplicates,
        holdout_documents=row.holdout_documents,
        created_at=row.created_at,
        updates=update_ids,
    )
