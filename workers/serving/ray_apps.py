"""What runs inside Ray Serve: the ingress that speaks HTTP, and the replicas of one model line.

Serve imports the two builders by their path (``ray_config``). The ingress stays light: torch is imported by
replicas only.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI
from prometheus_client import Metric
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from service.artifacts import Artifacts
from service.core.serving import ReplicaReport, Residence
from workers.serving.draining import Door, Doorkeeper
from workers.serving.generation import (
    Answer,
    Generation,
    Refused,
    RequestRefused,
    Served,
    failed,
    not_ready,
    overloaded,
    unknown_model,
)
from workers.serving.openai.app import build_app
from workers.serving.ray_config import (
    INGRESS,
    REPLICA,
    KnownModel,
    app_name,
    target_from_json,
    version_from_json,
)
from workers.serving.replica import Replica
from workers.serving.residency import served_by

logger = logging.getLogger(__name__)

T = TypeVar("T")

WAIT_FOR_REPLICA_SECONDS = (
    5.0  # how long a request waits for the first replica of a model before it is told to retry
)
REPORT_SECONDS = 2.0
WAKE_SECONDS = (
    60.0  # how long the replica of a model that sleeps may take to start, beside what it may take to load
)
AWAKE_SECONDS = 5.0  # how long one that has answered is taken for awake
STREAM_SECONDS = 300.0  # how long a replica that is to go lets its streams run on
ATTEMPTS = 3  # of a request whose replica died before anything of the answer was passed on
PINNED_ATTEMPTS = (
    8  # of one for a version that the replica does not hold: replicas need not hold the same earlier ones
)
NOT_HELD = ("model_not_found", "model_not_ready")


class ModelReplica:
    """One replica of one model line. Its user config is its target, and changes; where replicas are replaced for every
    version, that comes with its arguments.
    """

    def __init__(self, args: Mapping[str, str]) -> None:
        from workers.serving.engine import processes
        from workers.serving.engine.vllm import library as vllm_library

        if not vllm_library.is_installed():
            processes.prepare()  # beside all that follows
        from workers.serving.engine.loader import engine_loader

        self._replica = Replica(
            serve.get_replica_context().replica_tag,
            Artifacts.from_url(args["artifacts_url"]).open,
            engine_loader(int(args["threads"]), json.loads(args["engine"]), own_processes=True),
        )
        self._own = version_from_json(args["version"]) if "version" in args else None
        self._loaded_once = False
        self._sequence = 0

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Take a new target. The replica is out of routing meanwhile, so this returns at once and loads
        behind; only a new replica waits for its first version, as it must not be routed to before.
        """
        target = target_from_json(config)
        # Of two orchestrators that declare at once, the one that speaks last may be the one that had read first.
        if target.sequence >= self._sequence:
            self._sequence = target.sequence
            self._replica.set_target(target if self._own is None else replace(target, stable=self._own))
        if not self._loaded_once:
            await asyncio.to_thread(self._replica.wait_until_answering)
            self._loaded_once = True
            report = self._replica.report()
            if report.number is None and (target.rolling or target.proven):
                # Serve goes on with the replicas that it has, says so, and tries with another one. Of a version that has never
                # answered, the report says what is wrong with it.
                raise RuntimeError("; ".join(version.error or "" for version in report.versions))

    async def generate(self, request: Generation) -> AsyncGenerator[list[Answer], None]:
        async with aclosing(self._replica.generate(request)) as batches:
            async for batch in batches:
                yield batch

    async def report(self) -> ReplicaReport:
        return self._replica.report()

    async def metrics(self) -> list[Metric]:
        return self._replica.metrics()

    async def check_health(self) -> None:
        if not self._replica.healthy():
            raise RuntimeError("what answers has died or hangs, or nothing can be loaded any more")


@serve.ingress()
class Ingress:
    """The OpenAI interface. Its user config is ``{"models": {name: what the ingress knows of it}}``: whether any version is
    ``released``, and whether it may be ``asleep``, without a replica until it is asked.
    """

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
        self._models: Mapping[str, KnownModel] = {}
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._answered_at: dict[str, float] = {}  # by models that may sleep too

    def update(self, models: Mapping[str, KnownModel]) -> None:
        self._models = dict(models)
        for model in [model for model in self._handles if not self._is_released(model)]:
            del self._handles[model]
        for model in self._models:
            if self._is_released(model) and model not in self._handles:
                handle = serve.get_deployment_handle(REPLICA, app_name(model), _check_exists=False)
                # With options a handle begins to learn of its replicas now, not at the first request.
                self._handles[model] = handle.options(method_name="generate", stream=True)

    async def served(self) -> dict[str, Served]:
        models = list(self._handles)
        served = await asyncio.gather(*(self._served(model) for model in models))
        return {model: one for model, one in zip(models, served, strict=True) if one is not None}

    async def metrics(self) -> list[Metric]:
        """Of every replica that answers in time."""
        awake = await asyncio.gather(*(self._is_awake(model) for model in self._handles))
        handles = [handle for handle, runs in zip(self._handles.values(), awake, strict=True) if runs]
        asked = (asyncio.to_thread(_broadcast, handle, "metrics", list) for handle in handles)
        return [
            metric
            for of_replicas in await asyncio.gather(*asked)
            for of_one in of_replicas
            for metric in of_one
        ]

    async def generate(self, request: Generation) -> AsyncGenerator[list[Answer], None]:
        try:
            handle = await self._ready_handle(request.model)
        except RequestRefused as refusal:
            yield [refusal.refused]
            return
        died = not_held = 0
        while True:
            passed_on = False
            responses = handle.remote(request)
            try:
                async for batch in responses:
                    if not passed_on and _is_not_held(request, batch):
                        break
                    passed_on = True
                    yield batch
                else:
                    self._answered_at[request.model] = time.monotonic()
                    return
                not_held += 1
                if not_held == PINNED_ATTEMPTS:
                    yield await self._not_held(request, handle, batch)
                    return
            except BackPressureError:
                yield [overloaded(f"Too many requests wait for the model `{request.model}`").refused]
                return
            except DeploymentUnavailableError:
                yield [not_ready(f"The model `{request.model}` cannot be served at the moment").refused]
                return
            except RayActorError:
                died += 1
                if passed_on or died == ATTEMPTS:
                    yield [failed("The replica that answered has died").refused]
                    return
                logger.warning("a replica of %s died before it answered; trying another", request.model)
            except Exception as error:  # of Ray's, which has many; a stream that has begun must end in words
                logger.exception("a request to %s broke", request.model)
                yield [failed(f"The answer was lost: {type(error).__name__}").refused]
                return
            finally:
                _cancel(responses)  # nothing to do for one that is over

    async def _not_held(
        self, request: Generation, handle: DeploymentHandle[Any], said: list[Answer]
    ) -> list[Answer]:
        """What is answered of a version that none of the replicas holds that were asked, the last of which ``said`` so."""
        reports = await asyncio.to_thread(_broadcast, handle, "report", ReplicaReport)
        versions = [report.version(request.version or 0) for report in reports]
        if all(version is None or version.state == Residence.FAILED for version in versions):
            return said
        # Which of them is asked, is not ours to choose.
        message = f"Version {request.version} of the model `{request.model}` is not on every replica"
        return [not_ready(message, retry_after_seconds=1).refused]

    async def _ready_handle(self, model: str) -> DeploymentHandle[Any]:
        """The handle of a model that has a replica, or that is given one when it is asked. Raises RequestRefused."""
        known = self._models.get(model)
        if known is None:
            raise unknown_model(model)
        handle = self._handles.get(model)
        if handle is None:
            raise not_ready(f"No version of the model `{model}` has been released yet")
        deadline = time.monotonic() + WAIT_FOR_REPLICA_SECONDS
        while not (known["sleeps"] or handle.running_replicas_populated()):
            if time.monotonic() > deadline:
                raise not_ready(f"The model `{model}` is being loaded")
            await asyncio.sleep(0.05)
        if known["sleeps"] and time.monotonic() - self._answered_at.get(model, -math.inf) > AWAKE_SECONDS:
            await self._wake(model, handle, known["load_seconds"] + WAKE_SECONDS)
        return handle

    async def _wake(self, model: str, handle: DeploymentHandle[Any], seconds: float) -> None:
        """Raises RequestRefused where that takes too long: it may be that there is no place for its replica."""
        response = handle.options(method_name="report", stream=False).remote()
        try:
            await asyncio.wait_for(response, seconds)
        except TimeoutError:
            _cancel(response)
            raise not_ready(f"The model `{model}` is being loaded") from None
        except (RayError, RayServeException):
            _cancel(response)  # whoever asks it for more will hear why
        else:
            self._answered_at[model] = time.monotonic()

    async def _is_awake(self, model: str) -> bool:
        """Whether some replica would answer. A handle knows only whether any ever was."""
        if not self._handles[model].running_replicas_populated():
            return False
        return not self._models[model]["sleeps"] or await asyncio.to_thread(_any_runs, model)

    def _is_released(self, model: str) -> bool:
        known = self._models.get(model)
        return known is not None and known["released"]

    async def _served(self, model: str) -> Served | None:
        """What its replicas answer with. Of one that none answers for just now, only that it is there, if it has ever answered or
        may sleep: it is not woken for this.
        """
        reports = []
        if await self._is_awake(model):
            reports = await asyncio.to_thread(_broadcast, self._handles[model], "report", ReplicaReport)
        answering = [served for report in reports if (served := served_by(report)) is not None]
        if not answering:
            known = self._models[model]
            return Served(None, ()) if known["proven"] or known["sleeps"] else None
        numbers = [served.number for served in answering]
        loaded = {number for served in answering for number in served.loaded}
        return Served(max(numbers, key=numbers.count), tuple(sorted(loaded)))


def _any_runs(model: str) -> bool:
    """Whether Serve has a replica of the model. To ask the model itself would wake it."""
    app = serve.status().applications.get(app_name(model))
    deployment = None if app is None else app.deployments.get(REPLICA)
    return deployment is not None and deployment.replica_states.get("RUNNING", 0) > 0


def _cancel(response: Any) -> None:
    """Of a call that could not be made, that raises why once more."""
    with suppress(RayError, RayServeException):
        response.cancel()


def _broadcast(handle: DeploymentHandle[Any], method: str, kind: type[T]) -> list[T]:
    """What those replicas answer that do in time. At least one must be there: a broadcast to nobody waits for somebody."""
    try:
        answers = handle.broadcast(method).results(timeout_s=REPORT_SECONDS, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError):
        return []
    return [answer for answer in answers if isinstance(answer, kind)]


def _is_not_held(request: Generation, batch: list[Answer]) -> bool:
    """Whether a replica says that it has not the version that is asked for."""
    return request.version is not None and isinstance(batch[0], Refused) and batch[0].code in NOT_HELD


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
        # More than any engine takes, which is to refuse the others at once: past it, replicas could not even be asked how they are.
        max_ongoing_requests=1024,
        max_queued_requests=256,
        graceful_shutdown_timeout_s=STREAM_SECONDS,
        # A frozen process is found after three looks without an answer: within 30 s.
        health_check_period_s=3,
        health_check_timeout_s=6,
    )
    return deployment(ModelReplica).bind(args)
