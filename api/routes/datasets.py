"""Datasets: create, list, show."""

from collections.abc import Sequence

from fastapi import APIRouter
from sqlalchemy.orm import Session

from api.deps import DatabaseHere, PlaceHere, read_after_commit
from api.schemas.common import Page
from api.schemas.data import Dataset, NewDataset
from service.operations.datasets import create_dataset
from service.store import datasets, tables

router = APIRouter(tags=["data"])


@router.post("/datasets", status_code=201)
def add_dataset(body: NewDataset, database: DatabaseHere) -> Dataset:
    row = create_dataset(
        database, body.name, description=body.description, holdout_fraction=body.holdout_fraction
    )
    return read_after_commit(database, lambda session: _documents(session, [row])[0])


@router.get("/datasets")
def list_datasets(database: DatabaseHere, place: PlaceHere) -> Page[Dataset]:
    with database.reading() as session:
        rows, has_more = datasets.page_of_datasets(session, place.after, place.limit)
        return Page(data=_documents(session, rows), has_more=has_more)


@router.get("/datasets/{dataset}")
def show_dataset(dataset: str, database: DatabaseHere) -> Dataset:
    with database.reading() as session:
        return _documents(session, [datasets.dataset(session, dataset)])[0]


def _documents(session: Session, rows: Sequence[tables.Dataset]) -> list[Dataset]:
    newest = datasets.newest_numbers(session, [row.id for row in rows])
    return [
        Dataset(
            id=row.id,
            name=row.name,
            description=row.description,
            holdout_fraction=row.holdout_fraction,
            latest_version=newest.get(row.id),
            created_at=row.created_at,
        )
        for row in rows
    ]
