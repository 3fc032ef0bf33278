"""Pages of a list, oldest first, each starting after a known row."""

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
    """Return one page of ``query`` in rising ``order``, and whether more rows follow.

    ``after`` is the id of the last row of the page before. Raises InvalidRequest when no row has that id.
    """
    if after is not None:
        last = session.scalar(sa.select(order).where(order.class_.id == after))
        if last is None:
            raise InvalidRequest(f"after: no item of this list has the id {after!r}")
        query = query.where(order > last)
    rows = session.scalars(query.order_by(order).limit(limit + 1)).all()
    return rows[:limit], len(rows) > limit
