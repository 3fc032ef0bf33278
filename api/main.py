"""The control plane: HTTP in, HTTP out. ``python -m api.main`` serves it until SIGTERM."""

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from types import FrameType
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry
from pydantic.json_schema import models_json_schema

from api.body_limit import BodyLimit
from api.deps import Services
from api.errors import RESPONSES, add_handlers
from api.heap import give_memory_back
from api.idempotency import PARAMETER, Idempotency
from api.monitoring import QueueCollector, RequestMetrics
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
from api.schemas.common import BASE, IDEMPOTENCY_KEY, Problem
from api.schemas.data import LabelledSource, Source
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

NOUNS = (
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


class ControlPlane(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """What is generated, and what FastAPI does not see: bodies that it does not read, and problems."""
        schema = super().openapi()
        _, more = models_json_schema(
            [(Problem, "serialization"), (Source, "validation"), (LabelledSource, "validation")],
            ref_template="#/components/schemas/{model}",
        )
        schema["components"]["schemas"] |= more["$defs"]
        schema["components"].setdefault("parameters", {})[IDEMPOTENCY_KEY] = PARAMETER
        for path, methods in schema["paths"].items():
            if path.startswith(BASE) and "post" in methods:
                reference = {"$ref": f"#/components/parameters/{IDEMPOTENCY_KEY}"}
                methods["post"].setdefault("parameters", []).append(reference)
        return schema


def create_app(settings: Settings) -> FastAPI:
    """The application on the database and the artifacts that the settings name. Opens no connection yet."""
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

    app = ControlPlane(
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
    base = APIRouter(prefix=BASE, responses=RESPONSES)
    for noun in NOUNS:
        base.include_router(noun.router)
    app.include_router(base)
    app.include_router(health.router, responses=RESPONSES)
    return app


class Server(uvicorn.Server):
    """Tells the application's endless streams to end as soon as a signal asks the process to."""

    def __init__(self, config: uvicorn.Config, closing: threading.Event) -> None:
        super().__init__(config)
        self._closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._closing.set()
        set_exit_deadline()
        super().handle_exit(sig, frame)


def main() -> None:
    give_memory_back()
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
