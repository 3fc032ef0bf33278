"""The Serving port over Ray Serve 2.60: every call compares the declaration with Serve's report.

Serve and its applications are detached: they outlive this process, and the next one adopts them. All state is
read from Serve, so that applications which were stopped or changed by hand come back as declared.
"""

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from service.core.errors import Unavailable
from service.core.serving import ReplicaReport, Residence, ServedTarget, VersionReport
from service.core.stopping import DRAIN_SECONDS
from workers.serving.ray import declaration
from workers.serving.ray.declaration import INGRESS, INGRESS_APP, JSON, REPLICA, ReplicaOptions, app_name
from workers.serving.ray.sequences import Sequences

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 1.0  # time limit for Serve's controller and for replicas
FAILED_RETRY_SECONDS = 30.0
DRAIN_POLL_SECONDS = 0.25
IDLE_POLLS = 3  # in a row, because the proxy forwards the last bytes a moment after the ingress sends them
INGRESS_SECONDS = 3.0  # longer, because it shares two cores with decoding replicas and a trainer
REPLICA_GPUS = 0.05  # small enough for a GPU to hold several model lines, a trainer and the stage host


class RayServing:
    """Serves on the Ray cluster that this process is connected to.

    ``engine``: options for ``engine_loader``. ``num_gpus``: per replica; None takes a share if the cluster
    has a GPU. ``ends_with_us``: the Ray cluster stops when this process does.
    """

    def __init__(
        self,
        artifacts_url: str,
        host: str,
        port: int,
        *,
        engine: Mapping[str, int | str] | None = None,
        num_cpus: float = 0.1,
        num_gpus: float | None = None,
        ends_with_us: bool = False,
    ) -> None:
        self._host = host
        self._port = port
        self._options = ReplicaOptions(artifacts_url, engine or {}, num_cpus, num_gpus or 0.0)
        self._num_gpus_resolved = num_gpus is not None
        self._ends_with_us = ends_with_us
        self._admitted = False
        self._expected: dict[str, _Expected] = {}
        self._sequences = Sequences()
        self._starting: threading.Thread | None = None
        self._start_error: str | None = None
        self._retried_at = time.monotonic()

    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    def apply(self, targets: Sequence[ServedTarget]) -> None:
        if not self._num_gpus_resolved:
            # Only once: a GPU node that joins or leaves must not restart replicas.
            has_gpu = bool(ray.cluster_resources().get("GPU"))
            self._options = replace(self._options, num_gpus=REPLICA_GPUS if has_gpu else 0.0)
            self._num_gpus_resolved = True
        controller = self._controller()
        details: JSON = _await(controller.get_serve_instance_details.remote())
        targets = self._sequences.latest(targets, details, time.monotonic())
        self._expected = {target.model: _expected(target, details) for target in targets}
        declared = declaration.applications(targets, self._options)
        differing = declaration.differing(declared, details)
        failed = declaration.failed(details)
        if failed and time.monotonic() - self._retried_at > FAILED_RETRY_SECONDS:
            # Serve does not retry these. Remove them; the next call declares them again.
            logger.warning("Serve gave up on %s; starting over", ", ".join(sorted(failed)))
            self._retried_at = time.monotonic()
            _declare(controller, declaration.without(declared, failed))
        elif differing:
            logger.info("declaring to Serve: %s", ", ".join(sorted(differing)))
            _declare(controller, declared)
        reason = declaration.unavailable_reason(details)
        if reason is not None:
            raise Unavailable(f"serving is not responding yet: {reason}")
        if self._ends_with_us and not self._admitted:
            self._admit()

    def observe(self, models: Collection[str]) -> Mapping[str, Sequence[ReplicaReport]]:
        expected = {model: line for model, line in self._expected.items() if model in models}
        # Ask all lines at once, so that one that does not answer takes no time from the others.
        responses = {
            model: _ask_replicas(model)
            for model, line in expected.items()
            if line.stable and line.num_running
        }
        deadline = time.monotonic() + ANSWER_SECONDS
        observed = {}
        for model, line in expected.items():
            answers = _answers(model, responses.get(model), deadline)
            offset = self._sequences.offset(model)
            reports = _reports(model, line, answers)
            observed[model] = [replace(report, sequence=report.sequence - offset) for report in reports]
        return observed

    def close(self) -> None:
        """Leave Serve running. If Ray is about to stop, drain the ingress and wait for its requests."""
        if not self._ends_with_us:
            return
        deadline = time.monotonic() + DRAIN_SECONDS
        idle_polls = 0
        try:
            while idle_polls < IDLE_POLLS and time.monotonic() < deadline:
                idle_polls = 0 if sum(_call_ingress("drain")) else idle_polls + 1
                time.sleep(DRAIN_POLL_SECONDS)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("requests in flight may be cut off: %s", error)

    def _admit(self) -> None:
        """Stop the draining that an earlier orchestrator may have started before it stopped without Ray."""
        try:
            _call_ingress("admit")
        except (RayError, RayServeException, TimeoutError) as error:
            raise Unavailable(f"the ingress is not responding: {error}") from error
        self._admitted = True

    def _controller(self) -> Any:
        """Return Serve's controller. If there is none, start one in the background and raise Unavailable."""
        if self._starting is not None and self._starting.is_alive():
            raise Unavailable("Serve is starting")
        try:
            return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            reason, self._start_error = self._start_error, None
            self._starting = threading.Thread(target=self._start, name="start-serve", daemon=True)
            self._starting.start()
            raise Unavailable(f"Serve is starting{f'; last error: {reason}' if reason else ''}") from None

    def _start(self) -> None:
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": self._host, "port": self._port})
        except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
            logger.exception("Serve did not start")
            self._start_error = str(error)


@dataclass(frozen=True)
class _Expected:
    """The replicas a model line should have and how many run. ``error``: why Serve gave up on replacing them."""

    stable: int | None
    sequence: int
    num_replicas: int
    num_running: int
    error: str | None


def _expected(target: ServedTarget, details: JSON) -> _Expected:
    stable = None if target.stable is None else target.stable.number
    app = details["applications"].get(app_name(target.model))
    if app is None or REPLICA not in app["deployments"]:
        return _Expected(stable, target.sequence, max(target.spec.replicas.min, 1), 0, None)
    deployment = app["deployments"][REPLICA]
    error = None
    if target.rolling and "FAILED" in (app["status"] + deployment["status"]):
        error = deployment["message"] or app["message"]
    num_running = sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])
    return _Expected(stable, target.sequence, deployment["target_num_replicas"], num_running, error)


def _ask_replicas(model: str) -> Any:
    """Broadcast ``report``. Call it only while a replica runs: Serve waits for one. None on failure."""
    handle = serve.get_deployment_handle(REPLICA, app_name(model), _check_exists=False)
    try:
        return handle.broadcast("report")
    except (RayError, RayServeException, TimeoutError) as error:
        logger.debug("replicas of %s cannot be asked: %s", model, error)
        return None


def _answers(model: str, response: Any, deadline: float) -> list[ReplicaReport]:
    if response is None:
        return []
    try:
        seconds = max(deadline - time.monotonic(), 0.05)
        answers = response.results(timeout_s=seconds, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError) as error:
        logger.debug("replicas of %s are not responding: %s", model, error)
        return []
    return [answer for answer in answers if isinstance(answer, ReplicaReport)]


def _reports(model: str, expected: _Expected, answers: Sequence[ReplicaReport]) -> list[ReplicaReport]:
    """Return a report per replica that should run; it is empty for replicas that did not answer in time."""
    if expected.stable is None:
        return []
    reports = list(answers)
    for position in range(len(answers), max(expected.num_replicas, expected.num_running)):
        starting = position >= expected.num_running
        reports.append(ReplicaReport(f"{model}-{position}", None, starting=starting))
    if expected.error is not None:
        failure = VersionReport(expected.stable, Residence.FAILED, expected.error)
        reports.append(ReplicaReport(f"{model}-next", None, (failure,), expected.sequence))
    return reports


def _call_ingress(method: str) -> list[Any]:
    """Call every replica of the ingress and return their answers."""
    handle = serve.get_deployment_handle(INGRESS, INGRESS_APP, _check_exists=False)
    answers: list[Any] = handle.broadcast(method).results(timeout_s=INGRESS_SECONDS)
    return answers


def _declare(controller: Any, applications: Sequence[JSON]) -> None:
    _await(controller.apply_config.remote(ServeDeploySchema.model_validate({"applications": applications})))


def _await(reference: Any) -> Any:
    """Return the controller's answer. Raises Unavailable if it does not come in time."""
    try:
        return ray.get(reference, timeout=ANSWER_SECONDS)
    except GetTimeoutError as error:
        raise Unavailable("Serve's controller is not responding") from error
    except RayError as error:
        raise Unavailable(f"Serve's controller failed: {error}") from error
