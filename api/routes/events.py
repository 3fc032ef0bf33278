"""Events, in pages or as a stream of server-sent events that resumes without loss."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse

from api.deps import Services, ServicesDep, in_thread
from api.schemas.common import Page
from api.schemas.events import Event
from service.core.errors import DatabaseUnavailable, InvalidRequest
from service.store import events

router = APIRouter(tags=["events"])

LATEST = "latest"
POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 15.0
_BATCH = 100
_EVENT_STREAM = "text/event-stream"
_ID = re.compile(r"[0-9]{1,18}")


@router.get(
    "/events",
    response_model=Page[Event],
    responses={200: {"content": {_EVENT_STREAM: {"schema": {"type": "string"}}}}},
)
async def list_events(
    request: Request,
    services: ServicesDep,
    after: Annotated[str | None, Query(description=f"id of an event, or ``{LATEST}``")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Any:
    """List events, or stream them from ``Last-Event-ID`` on if the client accepts ``text/event-stream``.

    The stream does not end.
    """
    streams = _EVENT_STREAM in request.headers.get("accept", "")
    # A browser that reconnects sends both: ``after`` from its URL, and the last event it received.
    cursor = await _cursor(services, last_event_id if streams and last_event_id else after)
    if streams:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(_stream(services, cursor), media_type=_EVENT_STREAM, headers=headers)
    rows = await in_thread(lambda: _read(services, cursor, limit + 1))
    return Page(data=rows[:limit], has_more=len(rows) > limit)


async def _cursor(services: Services, after: str | None) -> int:
    if after is None:
        return 0
    if after == LATEST:
        return await in_thread(lambda: _latest_id(services))
    if not _ID.fullmatch(after):
        raise InvalidRequest(f"after: {after!r} is not an event id")
    return int(after)


async def _stream(services: Services, cursor: int) -> AsyncIterator[str]:
    # An id without data sets the client's Last-Event-ID, so that it can resume even before the first event.
    yield f"retry: 1000\nid: {cursor}\n\n"
    idle_seconds = 0.0
    while not services.closing.is_set():
        try:
            rows = await in_thread(lambda: _read(services, cursor, _BATCH))  # noqa: B023  (awaited at once)
        except DatabaseUnavailable:
            rows = []  # keep the stream open; it will send the missed events later
        for row in rows:
            yield f"id: {row.id}\nevent: {row.type}\ndata: {row.model_dump_json()}\n\n"
            cursor = int(row.id)
        idle_seconds = 0.0 if rows else idle_seconds + POLL_SECONDS
        if idle_seconds >= KEEP_ALIVE_SECONDS:
            yield ": keep-alive\n\n"
            idle_seconds = 0.0
        if len(rows) < _BATCH:
            await asyncio.sleep(POLL_SECONDS)


def _read(services: Services, after: int, limit: int) -> list[Event]:
    with services.database.reading() as session:
        rows = events.page(session, after, limit)
    return [Event.from_row(row, id=str(row.id)) for row in rows]


def _latest_id(services: Services) -> int:
    with services.database.reading() as session:
        return events.latest(session)
