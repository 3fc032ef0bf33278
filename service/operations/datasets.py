"""Creates datasets."""

from sqlalchemy.exc import IntegrityError

from service.core.errors import Conflict
from service.store import events
from service.store.database import Database, now
from service.store.tables import Dataset


def create_dataset(
    database: Database, name: str, *, description: str | None = None, holdout_fraction: float = 0.02
) -> Dataset:
    """Create a dataset. Raises Conflict if the name is taken."""
    try:
        with database.transaction() as session:
            row = Dataset(
                name=name,
                description=description,
                holdout_fraction=holdout_fraction,
                created_at=now(session),
            )
            session.add(row)
            session.flush()
            events.append(session, "dataset.created", dataset=name)
    except IntegrityError as error:
        raise Conflict(f"the name {name!r} is taken") from error
    return row
