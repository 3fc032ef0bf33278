"""What runs inside Ray Serve: the ingress that speaks HTTP, and the replicas of one model line.

Serve imports the two builders by their path (``ray_config``). The ingress stays light: torch is imported by
replicas only.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from service.artifacts import Artifacts
from service.core.serving import ReplicaReport
from workers.serving.draining import Door, Doorkeeper
from workers.serving.generation import (
    Answer,
    Generation,
    RequestRefused,
    failed,
    not_ready,
    overloaded,
    unknown_model,
)
from workers.serving.openai.app import build_app
from workers.serving.ray_config import INGRESS, REPLICA, app_name
from workers.serving.replica import Replica

logger = logging.getLogger(__name__)

WAIT_FOR_REPLICA_SECONDS = (
    5.0  # how long a request waits for the first replica of a model before it is told to retry
)
REPORT_SECONDS = 2.0
STREAM_SECONDS = 300.0  # how long a replica that is to go lets its streams run on
ATTEMPTS = 3  # of a request whose replica died before anything of the answer was passed on


class ModelReplica:
    """One replica of one model line. Its user config is its target: ``{"number", "key", "sequence"}``."""

    def __init__(self, artifacts_url: str, threads: int) -> None:
        from workers.serving.engine.transformers_engine import TransformersEngine

        self._replica = Replica(
            serve.get_replica_context().replica_tag,
            Artifacts.from_url(artifacts_url).open,
            partial(TransformersEngine, threads=threads),
        )
        self._loaded_once = False
        self._sequence = 0

    async def reconfigure(self, target: Mapping[str, Any]) -> None:
        """Take a new target. The replica is out of routing meanwhile, so this returns at once and loads
        behind; only a new replica waits for its first version, as it must not be routed to before.
        """
        # Of two orchestrators that declare at once, the one that speaks last may be the one that had read first.
        if target["sequence"] >= self._sequence:
            self._sequence = target["sequence"]
            self._replica.set_target(target["number"], target["key"])
        if not self._loaded_once:
            await asyncio.to_thread(self._replica.wait_until_settled)
            self._loaded_once = True

    async def generate(self, request: Generation) -> AsyncGenerator[list[Answer], None]:
        async with aclosing(self._replica.generate(request)) as batches:
            async for batch in batches:
                yield batch

    async def report(self) -> ReplicaReport:
        return self._replica.report()

    async def check_health(self) -> None:
        if not self._replica.healthy():
            raise RuntimeError("the decode thread or the loader has died")


@serve.ingress()
class Ingress:
    """The OpenAI interface. Its user config is ``{"models": {name: whether any version is released}}``."""

    def __init__(self) -> None:
        self._directory = _RayDirectory()
        self._door = Door()

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = build_app(self._directory)
        app.add_middleware(Doorkeeper, door=self._door)
        return app

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        self._directory.update(config["models"])

    async def drain(self) -> int:
        """Refuse what comes from now on. How many requests are still being answered."""
        self._door.shut()
        return self._door.inside

    async def admit(self) -> None:
        """Take requests again: whoever had it drain has not ended everything."""
        self._door.open()


class _RayDirectory:
    """Routes by model name to the handle of the model's own application."""

    def __init__(self) -> None:
        self._released: dict[str, bool] = {}
        self._handles: dict[str, DeploymentHandle[Any]] = {}

    def update(self, models: Mapping[str, bool]) -> None:
        self._released = dict(models)
        for model in [model for model in self._handles if not self._released.get(model)]:
            del self._handles[model]
        for model, released in self._released.items():
            if released and model not in self._handles:
                handle = serve.get_deployment_handle(REPLICA, app_name(model), _check_exists=False)
                # With options a handle begins to learn of its replicas now, not at the first request.
                self._handles[model] = handle.options(method_name="generate", stream=True)

    async def served(self) -> dict[str, int]:
        numbers = await asyncio.gather(*(self._number(handle) for handle in self._handles.values()))
        return {
            model: number for model, number in zip(self._handles, numbers, strict=True) if number is not None
        }

    async def generate(self, request: Generation) -> AsyncGenerator[list[Answer], None]:
        try:
            handle = await self._ready_handle(request.model)
        except RequestRefused as refusal:
            yield [refusal.refused]
            return
        for attempt in range(1, ATTEMPTS + 1):
            passed_on = False
            responses = handle.remote(request)
            try:
                async for batch in responses:
                    passed_on = True
                    yield batch
                return
            except BackPressureError:
                yield [overloaded(f"Too many requests wait for the model `{request.model}`").refused]
                return
            except DeploymentUnavailableError:
                yield [not_ready(f"The model `{request.model}` cannot be served at the moment").refused]
                return
            except RayActorError:
                if passed_on or attempt == ATTEMPTS:
                    yield [failed("The replica that answered has died").refused]
                    return
                logger.warning("a replica of %s died before it answered; trying another", request.model)
            finally:
                responses.cancel()  # nothing to do for one that is over

    async def _ready_handle(self, model: str) -> DeploymentHandle[Any]:
        """The handle of a model that has a replica. Raises RequestRefused."""
        if model not in self._released:
            raise unknown_model(model)
        handle = self._handles.get(model)
        if handle is None:
            raise not_ready(f"No version of the model `{model}` has been released yet")
        deadline = time.monotonic() + WAIT_FOR_REPLICA_SECONDS
        while not handle.running_replicas_populated():
            if time.monotonic() > deadline:
                raise not_ready(f"The model `{model}` is being loaded")
            await asyncio.sleep(0.05)
        return handle

    async def _number(self, handle: DeploymentHandle[Any]) -> int | None:
        """The version some replica answers with; None while none does."""
        if not handle.running_replicas_populated():
            return None
        response = handle.options(method_name="report", stream=False).remote()
        try:
            report: ReplicaReport = await asyncio.wait_for(response, REPORT_SECONDS)
        except (TimeoutError, RayActorError, DeploymentUnavailableError):
            response.cancel()
            return None
        return report.number


def ingress_app(args: dict[str, str]) -> Any:
    deployment = serve.deployment(
        name=INGRESS,
        max_ongoing_requests=2048,
        graceful_shutdown_timeout_s=STREAM_SECONDS,
        health_check_period_s=5,
        health_check_timeout_s=30,
    )
    return deployment(Ingress).bind()


def model_app(args: dict[str, str]) -> Any:
    deployment = serve.deployment(
        name=REPLICA,
        max_ongoing_requests=256,
        max_queued_requests=256,
        graceful_shutdown_timeout_s=STREAM_SECONDS,
        health_check_period_s=5,
        health_check_timeout_s=30,
    )
    return deployment(ModelReplica).bind(args["artifacts_url"], int(args["threads"]))
