"""Health: whether the process is alive, whether its dependencies answer, and metrics for Prometheus."""

import asyncio
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from api.deps import ServicesDep, in_thread
from api.schemas.events import Health
from service.core.errors import ErrorItem, PathswitchError, Unavailable
from service.store import migrate

router = APIRouter(tags=["health"])

CHECK_SECONDS = 5.0
_GCS_PORT = 6379


@router.get("/healthz")
async def healthz() -> Health:
    """Report that the process is alive. Checks nothing else."""
    return Health(status="alive")


@router.get("/readyz")
async def readyz(services: ServicesDep) -> Health:
    """Check the migrated ``database``, the ``artifacts``, and ``ray`` if configured.

    A 503 names the checks that failed.
    """
    checks: dict[str, Callable[[], None]] = {
        "database": lambda: migrate.check(services.database),
        "artifacts": services.artifacts.check,
    }
    address = ray_endpoint(services.settings.ray_address)
    if address is not None:
        checks["ray"] = lambda: _connect(address)
    failures = await asyncio.gather(*(_failure(name, check) for name, check in checks.items()))
    errors = [failure for failure in failures if failure is not None]
    if errors:
        names = ", ".join(error.location for error in errors)
        raise Unavailable(f"not ready: {names}", errors)
    return Health(status="ready", parts=tuple(checks))


@router.get("/metrics", response_class=Response)
async def prometheus(request: Request) -> Response:
    """Return the metrics of the control plane in Prometheus's text format."""
    page = await in_thread(lambda: generate_latest(request.app.state.registry))
    return Response(page, media_type=CONTENT_TYPE_LATEST)


def ray_endpoint(address: str | None) -> tuple[str, int] | None:
    """Host and port of a Ray address: ``host:port``, ``ray://host:port`` or the URL of its dashboard."""
    if address is None or address in ("auto", "local"):
        return None
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    return (parts.hostname, parts.port or _GCS_PORT) if parts.hostname else None


def _connect(address: tuple[str, int]) -> None:
    socket.create_connection(address, timeout=CHECK_SECONDS / 2).close()


async def _failure(name: str, check: Callable[[], None]) -> ErrorItem | None:
    try:
        await asyncio.wait_for(to_thread.run_sync(check, abandon_on_cancel=True), CHECK_SECONDS)
    except TimeoutError:
        return ErrorItem(name, f"no answer in {CHECK_SECONDS:g} seconds")
    except PathswitchError as error:
        return ErrorItem(name, error.detail)
    except OSError as error:
        return ErrorItem(name, str(error))
    return None
