"""Dependencies of the routes: the services that the process opened once, and the position in a list."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

from anyio import to_thread
from fastapi import Depends, Path, Query, Request
from sqlalchemy.orm import Session

from api.upload_pool import UploadPool
from service.artifacts import Artifacts
from service.registration.hash_cache import HashCache
from service.settings import Settings
from service.store.database import Database, retry_while_unavailable

_T = TypeVar("_T")

MAX_NUMBER = (1 << 31) - 1  # the largest value of an integer column

# The key in the ASGI scope of a database handle that this request must use instead of the process's.
REQUEST_DATABASE = "pathswitch.database"


@dataclass(frozen=True)
class Services:
    """The services of which a process has exactly one.

    ``uploads`` receives streamed bodies, ``small_uploads`` bodies that fit into memory; neither waits for the
    other. ``closing`` is set when the process should stop, and ends endless streams. ``cut_off`` is
    set when the grace period is over, and stops work that is still running.
    """

    settings: Settings
    database: Database
    artifacts: Artifacts
    hashes: HashCache
    uploads: UploadPool
    small_uploads: UploadPool
    closing: threading.Event
    cut_off: threading.Event


@dataclass(frozen=True)
class PageParams:
    """Which page of a list to return: at most ``limit`` items, after the item with id ``after``."""

    limit: int
    after: str | None


# Coroutines, because FastAPI runs plain functions on a thread, which every request would have to wait for.
async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    database = request.scope.get(REQUEST_DATABASE)
    return services if database is None else replace(services, database=database)


async def _database(services: Annotated[Services, Depends(_services)]) -> Database:
    return services.database


async def _page_params(
    limit: Annotated[int, Query(ge=1, le=100, description="maximum number of items")] = 20,
    after: Annotated[str | None, Query(description="id of the last item of the previous page")] = None,
) -> PageParams:
    return PageParams(limit, after)


ServicesDep = Annotated[Services, Depends(_services)]
DatabaseDep = Annotated[Database, Depends(_database)]
PageDep = Annotated[PageParams, Depends(_page_params)]
Number = Annotated[int, Path(ge=1, le=MAX_NUMBER)]


def read_after_commit(database: Database, document: Callable[[Session], _T]) -> _T:
    """Read the response of a committed request, retrying through short outages of the database."""

    def read() -> _T:
        with database.reading() as session:
            return document(session)

    return retry_while_unavailable(read)


async def in_thread(function: Callable[[], _T]) -> _T:
    """Run a blocking function (database, files) on a thread."""
    return await to_thread.run_sync(function)
