"""What happened, and whether all parts answer."""

from typing import Any

from api.schemas.common import Document, Time


class Event(Document):
    id: str
    type: str
    data: dict[str, Any]
    created_at: Time


class Health(Document):
    """``parts`` are those that were asked and answer."""

    status: str
    parts: tuple[str, ...] = ()
