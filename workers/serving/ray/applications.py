"""The Serve applications: the HTTP ingress, and the replicas of one model line.

Serve imports the two builders by their paths, which ``declaration`` gives it. Only replicas import torch.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from prometheus_client import Metric
from ray import serve

from service.artifacts import open_artifacts
from service.core.serving import ReplicaReport
from workers.serving.generation import AnswerItem, Generation
from workers.serving.openai.app import build_app
from workers.serving.openai.draining import DrainMiddleware, DrainState
from workers.serving.ray.declaration import INGRESS, REPLICA, target_from_json, version_from_json
from workers.serving.ray.directory import RayDirectory
from workers.serving.replica.replica import Replica

STREAM_SECONDS = 300.0  # how long a stopping replica lets its streams finish


class ModelReplica:
    """One replica of a model line. Its user config is its target; a rolling line passes the version as an argument."""

    def __init__(self, args: Mapping[str, str]) -> None:
        from workers.serving.engine import processes
        from workers.serving.engine.vllm import library

        if not library.is_installed():
            processes.prepare()  # in parallel with the imports below
        from workers.serving.engine.loader import engine_loader

        self._replica = Replica(
            serve.get_replica_context().replica_tag,
            open_artifacts(args["artifacts_url"]).open,
            engine_loader(int(args["threads"]), json.loads(args["engine"]), own_processes=True),
        )
        self._fixed_version = version_from_json(args["version"]) if "version" in args else None
        self._started = False
        self._sequence = 0

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Set a new target.

        Serve routes no requests to the replica until this returns, so it returns at once and the versions load in
        the background. Only a new replica waits for its first version, so that it gets no requests before that.
        """
        target = target_from_json(config)
        # When two orchestrators declare at once, the last to declare may have read the database first.
        if target.sequence >= self._sequence:
            self._sequence = target.sequence
            if self._fixed_version is not None:
                target = replace(target, stable=self._fixed_version)
            self._replica.pool.set_target(target)
        if not self._started:
            await asyncio.to_thread(self._replica.pool.wait_until_answering)
            self._started = True
            report = self._replica.pool.report()
            if report.number is None and (target.rolling or target.proven):
                # Serve keeps the other replicas, reports this message, and starts another replica. For a
                # line's first version the replica stays up and reports the error, as no other replica can.
                raise RuntimeError("; ".join(version.error or "" for version in report.versions))

    async def generate(self, request: Generation) -> AsyncGenerator[list[AnswerItem], None]:
        async with aclosing(self._replica.generate(request)) as batches:
            async for batch in batches:
                yield batch

    async def report(self) -> ReplicaReport:
        return self._replica.pool.report()

    async def metrics(self) -> list[Metric]:
        return self._replica.metrics()

    async def check_health(self) -> None:
        if not self._replica.healthy():
            raise RuntimeError("the served version was lost and cannot be loaded again in this process")


@serve.ingress()
class Ingress:
    """The OpenAI interface. Its user config is ``{"models": {name: KnownModel}}``."""

    def __init__(self) -> None:
        self._directory = RayDirectory()
        self._drain_state = DrainState()

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = build_app(self._directory)
        app.add_middleware(DrainMiddleware, state=self._drain_state)
        return app

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        self._directory.update(config["models"])

    async def drain(self) -> int:
        """Reject new requests from now on. Returns the number of requests still in flight."""
        self._drain_state.start()
        return self._drain_state.in_flight

    async def admit(self) -> None:
        """Accept requests again, after an orchestrator drained the ingress and then stopped alone."""
        self._drain_state.stop()


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
        # More than any engine accepts: the engine rejects the rest, and ``report`` still gets through.
        max_ongoing_requests=1024,
        max_queued_requests=256,
        graceful_shutdown_timeout_s=STREAM_SECONDS,
        # Three failed checks find a frozen process within 30 s.
        health_check_period_s=3,
        health_check_timeout_s=6,
    )
    return deployment(ModelReplica).bind(args)
