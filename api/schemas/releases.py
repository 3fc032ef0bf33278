"""Releases: what was served, and what is asked to be."""

from typing import Annotated, Literal

from pydantic import Field

from api.schemas.common import Document, Request, Text, Time
from service.core.states import ReleaseState


class NewRelease(Request):
    """``previous`` is what was served before that which is served now."""

    version: Annotated[int, Field(ge=1, lt=1 << 31)] | Literal["previous"]
    reason: Text | None = None


class Release(Document):
    """One line of the history. ``error`` says why replicas could not load it."""

    id: str
    model: str
    version: int
    state: ReleaseState
    by: str
    reason: str | None
    error: str | None
    requested_at: Time
    released_at: Time | None
    retired_at: Time | None
