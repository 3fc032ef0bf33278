"""The two kinds of Serve deployment: the ingress that speaks OpenAI's HTTP, and the replica that answers for one model line.

They are applications of their own, so that a model line comes, goes and scales without touching the others. The ingress
finds a model by its application's name; it imports no torch and holds no version.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import RayServeException

from service.artifacts import Artifacts
from service.core.serving import ReplicaReport
from workers.serving.generation import Answer, Generation, not_ready, unknown_model
from workers.serving.openai_app import build_app

INGRESS_APP = "pathswitch"
_MODEL_APP_PREFIX = "model-"
_KNOWN_SECONDS = 2.0  # how long the ingress trusts its list of models


def app_name(model: str) -> str:
    return _MODEL_APP_PREFIX + model


def model_names(applications: Any) -> list[str]:
    """The model lines among the names of Serve's applications."""
    return sorted(
        name.removeprefix(_MODEL_APP_PREFIX) for name in applications if name.startswith(_MODEL_APP_PREFIX)
    )


class ModelReplica:
    """One replica of a model line. ``reconfigure`` returns at once: the new version is loaded beside the one that answers.

    Measured: a load of 3 s inside ``reconfigure`` made the worst request wait 4.8 s, a load beside it 0.34 s.
    """

    def __init__(self, artifacts_url: str, threads: int) -> None:
        from workers.serving.replica import Replica
        from workers.serving.transformers_engine import TransformersEngine

        artifacts = Artifacts.from_url(artifacts_url)
        replica_id = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(replica_id, artifacts.open, partial(TransformersEngine, threads=threads))

    def reconfigure(self, target: dict[str, Any]) -> None:
        self._replica.set_target(target["number"], target["key"])

    async def report(self) -> ReplicaReport:
        return self._replica.report()

    async def generate(self, request: Generation) -> AsyncGenerator[list[Answer], None]:
        async with aclosing(self._replica.generate(request)) as batches:
            async for batch in batches:
                yield batch

    def check_health(self) -> None:
        if not self._replica.healthy():
            raise RuntimeError("the engine does not decode any more")

    def __del__(self) -> None:
        replica = getattr(self, "_replica", None)
        if replica is not None:
            replica.close()


class ServeDirectory:
    """Finds model lines among Serve's applications, from inside the ingress."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._known: list[str] = []
        self._known_at = -_KNOWN_SECONDS

    async def served(self) -> dict[str, int]:
        reports = await asyncio.gather(*(self._report(model) for model in await self._models()))
        return {model: report.number for model, report in reports if report and report.number is not None}

    async def generate(self, request: Generation) -> AsyncGenerator[list[Answer], None]:
        try:
            handle = await self._handle(request.model)
        except RayServeException:
            yield [unknown_model(request.model).refused]
            return
        try:
            answers = handle.options(stream=True).generate.remote(request)
            async for batch in answers:
                yield batch
        except RayServeException as error:
            yield [not_ready(f"The model `{request.model}` does not answer: {error}").refused]

    async def _report(self, model: str) -> tuple[str, ReplicaReport | None]:
        try:
            handle = await self._handle(model)
            return model, await asyncio.wait_for(handle.report.remote(), 5)
        except (RayServeException, TimeoutError):
            return model, None

    async def _models(self) -> list[str]:
        if time.monotonic() - self._known_at > _KNOWN_SECONDS:
            status = await asyncio.to_thread(serve.status)
            self._known, self._known_at = model_names(status.applications), time.monotonic()
        return self._known

    async def _handle(self, model: str) -> Any:
        """The handle of a model line's application. Raises RayServeException where there is no such application."""
        if model not in self._handles:
            self._handles[model] = await asyncio.to_thread(serve.get_app_handle, app_name(model))
        return self._handles[model]


def build_ingress() -> FastAPI:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return build_app(ServeDirectory())


class Ingress:
    """OpenAI's HTTP interface; all of it is in the app that ``build_ingress`` gives."""
