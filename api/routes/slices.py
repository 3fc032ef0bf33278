"""Uploaded evaluation sets: register one by streaming a body, list them."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api.deps import MAX_NUMBER, DatabaseDep, PageDep, ServicesDep, in_thread
from api.schemas.common import Page
from api.schemas.data import Slice, Source
from api.upload import openapi_body, receive_upload
from service.core.specs import Name
from service.ingest.stream import in_worker
from service.registration.slices import check_slice, register_slice
from service.store import datasets

router = APIRouter(tags=["data"])


@router.post(
    "/datasets/{dataset}/slices",
    status_code=201,
    responses={200: {"model": Slice, "description": "The slice already exists"}},
    openapi_extra=openapi_body(Source),
)
async def add_slice(
    dataset: str,
    request: Request,
    response: Response,
    services: ServicesDep,
    name: Annotated[Name, Query()],
    data_version: Annotated[int | None, Query(ge=1, le=MAX_NUMBER)] = None,
) -> Slice:
    """Upload an immutable evaluation set. Its documents are kept out of training from the next update on."""
    database = services.database
    await in_thread(partial(check_slice, database, dataset, name))
    async with receive_upload(request, services, Source) as received:
        register = partial(
            register_slice, database, dataset, received.ingest, name=name, data_version=data_version
        )
        registered = await in_worker(register, received.threads)
    response.status_code = 201 if registered.created else 200
    return Slice.from_row(registered.row, dataset=dataset)


@router.get("/datasets/{dataset}/slices")
def list_slices(dataset: str, database: DatabaseDep, page: PageDep) -> Page[Slice]:
    """List the uploaded evaluation sets of a dataset."""
    with database.reading() as session:
        row = datasets.dataset(session, dataset)
        rows, has_more = datasets.page_of_slices(session, row.id, page.after, page.limit)
    return Page(data=[Slice.from_row(row, dataset=dataset) for row in rows], has_more=has_more)
