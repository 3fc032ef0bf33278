"""Bodies and field types that all nouns share: base models, pages and problem documents."""

from datetime import datetime
from typing import Annotated, Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

BASE = "/api/v1"  # prefix of every route except the health routes

IDEMPOTENCY_KEY = "Idempotency-Key"  # header that makes a POST safe to repeat

Item = TypeVar("Item")

# PostgreSQL cannot store NUL in text.
Text = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00]*$")]

# Always timezone-aware UTC, so that JSON shows it as RFC 3339 with a Z.
Time = datetime


class RequestModel(BaseModel):
    """Base of request bodies. Refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ResponseModel(BaseModel):
    """Base of response bodies. Reads its fields from the attributes of database rows."""

    model_config = ConfigDict(frozen=True, extra="ignore", from_attributes=True)

    @classmethod
    def from_row(cls, row: object, **fields: Any) -> Self:
        """Copy attributes of ``row``, except ``fields``, which the row lacks or holds in another form."""
        names = cls.model_fields.keys() - fields.keys()
        return cls.model_validate({name: getattr(row, name) for name in names} | fields)


class Page(ResponseModel, Generic[Item]):
    """One page of a list, oldest first. ``after=<id of the last item>`` gives the next page."""

    data: list[Item]
    has_more: bool


class ProblemItem(ResponseModel):
    """One of several errors, e.g. at ``line 7``: ``no field 'text'``."""

    location: str
    message: str


class Problem(ResponseModel):
    """An RFC 9457 problem document. ``code`` is for programs, ``detail`` for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[ProblemItem] | None = None
