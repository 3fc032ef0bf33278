"""Finds the replicas of models behind Ray Serve."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from prometheus_client import Metric
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from service.core.serving import ReplicaReport, Residence
from workers.serving.generation import (
    AnswerItem,
    Generation,
    RejectionError,
    RequestRejected,
    failed,
    not_ready,
    overloaded,
    unknown_model,
)
from workers.serving.openai.directory import ServedModel, served_model
from workers.serving.ray.declaration import REPLICA, KnownModel, app_name

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_REPLICA_SECONDS = 5.0  # how long a request waits for the first replica before it is rejected
REPORT_SECONDS = 2.0
WAKE_SECONDS = 60.0  # how long the replica of a sleeping model may take to start, besides loading
AWAKE_SECONDS = 5.0  # how long a model counts as awake after an answer
ATTEMPTS = 3  # for a request whose replica dies before the first batch
# For a request that names a version, because replicas may keep different earlier versions.
PINNED_ATTEMPTS = 8
NOT_LOADED_CODES = ("model_not_found", "model_not_ready")


def generate_handle(model: str) -> DeploymentHandle[Any]:
    """Return a handle to ``generate`` of the model's replicas."""
    handle = serve.get_deployment_handle(REPLICA, app_name(model), _check_exists=False)
    # A handle with options discovers its replicas right away, not at the first request.
    return handle.options(method_name="generate", stream=True)


class RayDirectory:
    """Routes requests by model name to the replicas of the model's own application."""

    def __init__(self, handle_for: Callable[[str], DeploymentHandle[Any]] = generate_handle) -> None:
        self._handle_for = handle_for
        self._models: Mapping[str, KnownModel] = {}
        self._handles: dict[str, DeploymentHandle[Any]] = {}  # for released models
        self._answered_at: dict[str, float] = {}

    def update(self, models: Mapping[str, KnownModel]) -> None:
        self._models = dict(models)
        released = [name for name, model in models.items() if model["released"]]
        for name in self._handles.keys() - set(released):
            del self._handles[name]
        for name in released:
            if name not in self._handles:
                self._handles[name] = self._handle_for(name)

    async def served(self) -> dict[str, ServedModel]:
        names = list(self._handles)
        served = await asyncio.gather(*(self._served(name) for name in names))
        return {name: model for name, model in zip(names, served, strict=True) if model is not None}

    async def metrics(self) -> list[Metric]:
        """Return the metrics of every replica that answers in time."""
        handles = dict(self._handles)
        awake = await asyncio.gather(*(self._is_awake(model) for model in handles))
        by_model = await asyncio.gather(
            *(
                asyncio.to_thread(_broadcast, handle, "metrics", list)
                for handle, is_awake in zip(handles.values(), awake, strict=True)
                if is_awake
            )
        )
        return [metric for replicas in by_model for metrics in replicas for metric in metrics]

    async def generate(self, request: Generation) -> AsyncGenerator[list[AnswerItem], None]:
        try:
            handle = await self._ready_handle(request.model)
        except RejectionError as error:
            yield [error.rejection]
            return
        num_deaths = num_not_loaded = 0
        while True:
            started = False
            responses = handle.remote(request)
            try:
                async for batch in responses:
                    if not started and _is_not_loaded(request, batch):
                        break
                    started = True
                    yield batch
                else:
                    self._answered_at[request.model] = time.monotonic()
                    return
                num_not_loaded += 1
                if num_not_loaded == PINNED_ATTEMPTS:
                    yield await self._not_loaded(request, handle, batch)
                    return
            except BackPressureError:
                yield [overloaded(f"Too many requests are waiting for the model `{request.model}`").rejection]
                return
            except DeploymentUnavailableError:
                yield [not_ready(f"The model `{request.model}` is temporarily unavailable").rejection]
                return
            except RayActorError:
                num_deaths += 1
                if started or num_deaths == ATTEMPTS:
                    yield [failed("The replica died while answering").rejection]
                    return
                logger.warning("a replica of %s died before it answered; trying another", request.model)
            except Exception as error:  # Ray raises many kinds, and the stream must end with an error event
                logger.exception("a request to %s failed", request.model)
                yield [failed(f"The response was lost: {type(error).__name__}").rejection]
                return
            finally:
                _cancel(responses)  # no effect on a finished one

    async def _not_loaded(
        self, request: Generation, handle: DeploymentHandle[Any], rejection: list[AnswerItem]
    ) -> list[AnswerItem]:
        """Reject a request for a version that no replica tried so far has loaded. ``rejection`` is the last one's."""
        reports = await asyncio.to_thread(_broadcast, handle, "report", ReplicaReport)
        versions = [report.version(request.version or 0) for report in reports]
        if all(version is None or version.state == Residence.FAILED for version in versions):
            return rejection
        # Another replica has it or is loading it, but Serve chooses the replica.
        message = f"Version {request.version} of the model `{request.model}` is not loaded on every replica"
        return [not_ready(message, retry_after_seconds=1).rejection]

    async def _ready_handle(self, model: str) -> DeploymentHandle[Any]:
        """Return the handle of a model with a replica; wake the model if it sleeps. Raises RejectionError."""
        known = self._models.get(model)
        if known is None:
            raise unknown_model(model)
        handle = self._handles.get(model)
        if handle is None:
            raise not_ready(f"No version of the model `{model}` has been released yet")
        if known["sleeps"]:
            if time.monotonic() - self._answered_at.get(model, -math.inf) > AWAKE_SECONDS:
                await self._wake(model, handle, known["load_seconds"] + WAKE_SECONDS)
            return handle
        deadline = time.monotonic() + FIRST_REPLICA_SECONDS
        while not handle.running_replicas_populated():
            if time.monotonic() > deadline:
                raise not_ready(f"The model `{model}` is being loaded")
            await asyncio.sleep(0.05)
        return handle

    async def _wake(self, model: str, handle: DeploymentHandle[Any], seconds: float) -> None:
        """Start a replica. Raises RejectionError if that takes too long, e.g. because the cluster is full."""
        response = handle.options(method_name="report", stream=False).remote()
        try:
            await asyncio.wait_for(response, seconds)
        except TimeoutError:
            _cancel(response)
            raise not_ready(f"The model `{model}` is being loaded") from None
        except (RayError, RayServeException):
            _cancel(response)  # the request itself will meet the same error and report it
        else:
            self._answered_at[model] = time.monotonic()

    async def _is_awake(self, model: str) -> bool:
        """Whether a replica runs. For a model that may sleep, the handle only knows whether one ever did."""
        if not self._handles[model].running_replicas_populated():
            return False
        return not self._models[model]["sleeps"] or await asyncio.to_thread(_has_running_replica, model)

    async def _served(self, model: str) -> ServedModel | None:
        """Return what the replicas of a model answer with, without waking it.

        If none answers, the model is still listed when it has answered before or may be asleep.
        """
        reports = []
        if await self._is_awake(model):
            reports = await asyncio.to_thread(_broadcast, self._handles[model], "report", ReplicaReport)
        answering = [served for report in reports if (served := served_model(report)) is not None]
        if not answering:
            known = self._models[model]
            return ServedModel(None, ()) if known["proven"] or known["sleeps"] else None
        numbers = [served.number for served in answering]
        loaded = {number for served in answering for number in served.loaded}
        return ServedModel(max(numbers, key=numbers.count), tuple(sorted(loaded)))


def _has_running_replica(model: str) -> bool:
    """Ask Serve, because a request to the model would wake it."""
    app = serve.status().applications.get(app_name(model))
    deployment = None if app is None else app.deployments.get(REPLICA)
    return deployment is not None and deployment.replica_states.get("RUNNING", 0) > 0


def _cancel(response: Any) -> None:
    """Cancel a call. If the call could not be made, cancelling raises its error again."""
    with suppress(RayError, RayServeException):
        response.cancel()


def _broadcast(handle: DeploymentHandle[Any], method: str, kind: type[T]) -> list[T]:
    """Return the answers that arrive in time. Call this only while a replica is running: Serve waits for one."""
    try:
        answers = handle.broadcast(method).results(timeout_s=REPORT_SECONDS, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError):
        return []
    return [answer for answer in answers if isinstance(answer, kind)]


def _is_not_loaded(request: Generation, batch: list[AnswerItem]) -> bool:
    """Whether a replica rejects the request because it has not loaded the version that it names."""
    first = batch[0]
    return (
        request.version is not None and isinstance(first, RequestRejected) and first.code in NOT_LOADED_CODES
    )
