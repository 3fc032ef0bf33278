"""Datasets: create, list, show."""

from collections.abc import Sequence

from fastapi import APIRouter
from sqlalchemy.orm import Session

from api.deps import DatabaseDep, PageDep, read_after_commit
from api.schemas.common import Page
from api.schemas.data import Dataset, NewDataset
from service.operations.datasets import create_dataset
from service.store import datasets, tables

router = APIRouter(tags=["data"])


@router.post("/datasets", status_code=201)
def add_dataset(body: NewDataset, database: DatabaseDep) -> Dataset:
    """Create a dataset without data."""
    row = create_dataset(
        database, body.name, description=body.description, holdout_fraction=body.holdout_fraction
    )
    return read_after_commit(database, lambda session: _documents(session, [row])[0])


@router.get("/datasets")
def list_datasets(database: DatabaseDep, page: PageDep) -> Page[Dataset]:
    """List the datasets."""
    with database.reading() as session:
        rows, has_more = datasets.page_of_datasets(session, page.after, page.limit)
        return Page(data=_documents(session, rows), has_more=has_more)


@router.get("/datasets/{dataset}")
def show_dataset(dataset: str, database: DatabaseDep) -> Dataset:
    """Show a dataset."""
    with database.reading() as session:
        return _documents(session, [datasets.dataset(session, dataset)])[0]


def _documents(session: Session, rows: Sequence[tables.Dataset]) -> list[Dataset]:
    newest = datasets.newest_numbers(session, [row.id for row in rows])
    return [Dataset.from_row(row, latest_version=newest.get(row.id)) for row in rows]
