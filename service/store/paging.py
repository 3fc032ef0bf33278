"""Lists are oldest first, by id or number, in pages after a known row."""

from collections.abc import Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import InstrumentedAttribute, Session

Row = TypeVar("Row")


def page(
    session: Session,
    query: sa.Select[tuple[Row]],
    column: InstrumentedAttribute[Any],
    after: Any | None,
    limit: int,
) -> tuple[Sequence[Row], bool]:
    """One page of ``query`` in rising ``column``, and whether more rows follow."""
    if after is not None:
        query = query.where(column > after)
    rows = session.scalars(query.order_by(column).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit
