"""The control plane's HTTP server. ``python -m api.main`` runs it until SIGTERM."""

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from types import FrameType

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry

from api.body_limit import BodyLimit
from api.deps import Services
from api.errors import add_handlers
from api.idempotency import Idempotency
from api.malloc import return_freed_memory
from api.monitoring import QueueCollector, RequestMetrics
from api.openapi import DEFAULT_RESPONSE, ControlPlaneApp
from api.routes import (
    checkpoints,
    costs,
    data_versions,
    datasets,
    events,
    forgetting,
    health,
    metrics,
    model_versions,
    models,
    releases,
    slices,
    updates,
)
from api.schemas.common import BASE
from api.upload_pool import UploadPool
from service.artifacts import open_artifacts
from service.core.stopping import DRAIN_SECONDS, set_exit_deadline
from service.registration.hash_cache import HashCache
from service.settings import Settings
from service.store.database import Database

# A streaming body takes 3 MiB of memory, and 6 MiB more on a thread while its hashes are merged.
MAX_UPLOADS = 8
UPLOAD_THREADS = 4

# More threads than cores, because half of a small registration is waiting for fsync.
MAX_SMALL_UPLOADS = 64
SMALL_UPLOAD_THREADS = 16

ROUTE_MODULES = (
    datasets,
    data_versions,
    slices,
    models,
    model_versions,
    checkpoints,
    forgetting,
    costs,
    updates,
    metrics,
    events,
    releases,
)


def create_app(settings: Settings) -> FastAPI:
    """Build the application for these settings. Opens no connections yet."""
    database, artifacts = Database(settings.database), open_artifacts(settings.artifacts)
    services = Services(
        settings=settings,
        database=database,
        artifacts=artifacts,
        hashes=HashCache(artifacts),
        uploads=UploadPool("upload", slots=MAX_UPLOADS, threads=UPLOAD_THREADS),
        small_uploads=UploadPool("small", slots=MAX_SMALL_UPLOADS, threads=SMALL_UPLOAD_THREADS),
        closing=threading.Event(),
        cut_off=threading.Event(),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        services.closing.set()
        services.cut_off.set()
        services.uploads.close()
        services.small_uploads.close()
        database.close()

    app = ControlPlaneApp(
        title="Pathswitch",
        version=version("pathswitch"),
        lifespan=lifespan,
        docs_url=f"{BASE}/docs",
        redoc_url=None,
        openapi_url=f"{BASE}/openapi.json",
        generate_unique_id_function=_operation_id,
    )
    app.state.services = services
    app.state.registry = CollectorRegistry()
    app.state.registry.register(QueueCollector(database))
    app.add_middleware(Idempotency, database=database)
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestMetrics, registry=app.state.registry)
    add_handlers(app)
    base = APIRouter(prefix=BASE, responses=DEFAULT_RESPONSE)
    for module in ROUTE_MODULES:
        base.include_router(module.router)
    app.include_router(base)
    app.include_router(health.router, responses=DEFAULT_RESPONSE)
    return app


class Server(uvicorn.Server):
    """A uvicorn server that also ends event streams, which never end by themselves, when it gets a signal."""

    def __init__(self, config: uvicorn.Config, closing: threading.Event) -> None:
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._closing.set()
        set_exit_deadline()
        super().handle_exit(sig, frame)


def main() -> None:
    return_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = Settings()
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    Server(config, app.state.services.closing).run()


def _operation_id(route: APIRoute) -> str:
    return route.name


if __name__ == "__main__":
    main()
