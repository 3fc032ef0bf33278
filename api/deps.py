"""What routes are given: the parts that the process has opened once, and the place in a list."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from anyio import to_thread
from fastapi import Depends, Path, Query, Request
from sqlalchemy.orm import Session

from api.admission import Lane
from service.artifacts import Artifacts
from service.register_versions import VersionRegistrar
from service.settings import Settings
from service.store.database import Database, patiently

_T = TypeVar("_T")

MAX_NUMBER = (1 << 31) - 1  # what an integer column holds


@dataclass(frozen=True)
class Services:
    """What a process has one of.

    ``uploads`` take in bodies that are streamed, and ``small_uploads`` those that are read whole first: neither waits for
    the other. ``closing`` is set when the process shall end, for what would never end by itself; ``cut_off`` when nobody
    waits any more for what has not ended until then.
    """

    settings: Settings
    database: Database
    artifacts: Artifacts
    versions: VersionRegistrar
    uploads: Lane
    small_uploads: Lane
    closing: threading.Event
    cut_off: threading.Event


@dataclass(frozen=True)
class Place:
    """Which page of a list."""

    limit: int
    after: str | None


# Written as coroutines, because a plain function would cost every request a hop to a thread and back.
async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def _database(services: Annotated[Services, Depends(_services)]) -> Database:
    return services.database


async def _place(
    limit: Annotated[int, Query(ge=1, le=100, description="how many at most")] = 20,
    after: Annotated[str | None, Query(description="the id of the last one of the page before")] = None,
) -> Place:
    return Place(limit, after)


ServicesHere = Annotated[Services, Depends(_services)]
DatabaseHere = Annotated[Database, Depends(_database)]
PlaceHere = Annotated[Place, Depends(_place)]
Number = Annotated[int, Path(ge=1, le=MAX_NUMBER)]


def told(database: Database, document: Callable[[Session], _T]) -> _T:
    """What to answer of what was carried out already: a database that is away now must not turn it into a failure."""

    def read() -> _T:
        with database.reading() as session:
            return document(session)

    return patiently(read)


async def in_thread(function: Callable[[], _T]) -> _T:
    """Run what blocks (the database, files) off the event loop."""
    return await to_thread.run_sync(function)
