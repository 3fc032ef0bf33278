"""Lists are oldest first, by id or number, in pages after a known row."""

from collections.abc import Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.core.errors import InvalidRequest

Row = TypeVar("Row")


def page(
    session: Session,
    query: sa.Select[Row],
    order: InstrumentedAttribute[Any],
    after: str | None,
    limit: int,
) -> tuple[Sequence[Row], bool]:
    """One page of ``query`` in rising ``order``, after the row with the id ``after``; whether more follow.

    Raises InvalidRequest where there is no such row.
    """
    if after is not None:
        last = session.scalar(sa.select(order).where(order.class_.id == after))
        if last is None:
            raise InvalidRequest(f"after: nothing here has the id {after!r}")
        query = query.where(order > last)
    rows = session.scalars(query.order_by(order).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit
