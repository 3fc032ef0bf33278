"""The shapes that every noun shares: bodies, pages, problems, and the types of their fields."""

from datetime import datetime
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

BASE = "/api/v1"  # what the paths of all routes begin with, but for health

IDEMPOTENCY_KEY = "Idempotency-Key"  # the header by which a POST is carried out once

Item = TypeVar("Item")

# PostgreSQL's text has no NUL.
Text = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00]*$")]

# Always aware and UTC, so that JSON has it in RFC 3339 with a Z.
Time = datetime


class Request(BaseModel):
    """What a caller sends."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Document(BaseModel):
    """What the service answers."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Page(Document, Generic[Item]):
    """Part of a list, oldest first. ``after=<id of the last one>`` gives the next page."""

    data: list[Item]
    has_more: bool


class ProblemItem(Document):
    """One of several findings, e.g. ``line 7``: ``no field 'text'``."""

    location: str
    message: str


class Problem(Document):
    """An error, as RFC 9457 has it. ``code`` is for programs, ``detail`` for people."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[ProblemItem] | None = None
