"""Events, and the health of the service."""

from typing import Any

from api.schemas.common import ResponseModel, Time


class Event(ResponseModel):
    id: str
    type: str
    data: dict[str, Any]
    created_at: Time


class Health(ResponseModel):
    """Health of the service. ``parts`` lists the parts that were checked and answer."""

    status: str
    parts: tuple[str, ...] = ()
