"""What all tables share: the declarative base with its names and types, and the constraints they are built from."""

from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy import Index
from sqlalchemy.orm import DeclarativeBase

from service.store.columns import Json, UtcDateTime


class Base(DeclarativeBase):
    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        datetime: UtcDateTime(),
        dict[str, Any]: Json,
        list[str]: Json,
        list[dict[str, Any]]: Json,
    }


def state_check(enum: type[StrEnum]) -> sa.CheckConstraint:
    """``state`` is a value of the enum."""
    values = ", ".join(f"'{state}'" for state in enum)
    return sa.CheckConstraint(f"state IN ({values})", name="state")


def finished_check(states: frozenset[Any]) -> sa.CheckConstraint:
    """``finished_at`` is set in these states and in no other."""
    values = ", ".join(f"'{state}'" for state in sorted(states))
    return sa.CheckConstraint(f"(finished_at IS NOT NULL) = (state IN ({values}))", name="finished_at")


def partial_index(name: str, *columns: str, where: str, unique: bool = False) -> Index:
    """An index of the rows that satisfy ``where``."""
    condition = sa.text(where)
    return Index(name, *columns, unique=unique, sqlite_where=condition, postgresql_where=condition)


def unique_where(name: str, *columns: str, where: str) -> Index:
    """At most one row per value of ``columns`` satisfies ``where``."""
    return partial_index(name, *columns, where=where, unique=True)
