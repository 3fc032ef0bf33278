"""The Serving port over Ray Serve 2.60: every call compares what is declared with what Serve reports.

Serve and its applications are detached: they outlive this process, and the next one finds and adopts them.
Nothing is remembered that Serve would not say itself, so that a Serve that was ended or changed comes back as
declared.
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
from workers.serving import ray_config
from workers.serving.ray_config import INGRESS, INGRESS_APP, JSON, REPLICA, ReplicaOptions, app_name
from workers.serving.ray_sequences import Sequences

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 1.0  # of Serve's controller and of replicas; past it they do not answer
FAILED_RETRY_SECONDS = 30.0
DRAIN_LOOK_SECONDS = 0.25
QUIET_LOOKS = 3  # in a row: what the ingress has answered with, the proxy passes on a moment later
INGRESS_SECONDS = 3.0  # beside decoding replicas and a trainer on two cores
REPLICA_GPUS = 0.05  # so that one GPU holds several model lines beside a trainer and the stage host


class RayServing:
    """Serves over the Ray this process is connected to. ``num_gpus`` a replica; None: a share where there is
    a GPU. ``engine``: as ``engine_loader`` is given it. ``ends_with_us``: whoever runs that Ray ends it when this
    process has ended.
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
        self._gpus_known = num_gpus is not None
        self._ends_with_us = ends_with_us
        self._admits = False
        self._expected: dict[str, _Expected] = {}
        self._sequences = Sequences()
        self._starting: threading.Thread | None = None
        self._start_error: str | None = None
        self._retried_at = time.monotonic()

    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    def apply(self, targets: Sequence[ServedTarget]) -> None:
        if not self._gpus_known:
            # Once: replicas must not be restarted because a node with a GPU comes or goes.
            has_gpu = bool(ray.cluster_resources().get("GPU"))
            self._options = replace(self._options, num_gpus=REPLICA_GPUS if has_gpu else 0.0)
            self._gpus_known = True
        controller = self._controller()
        details: JSON = _ask(controller.get_serve_instance_details.remote())
        targets = self._sequences.latest(targets, details, time.monotonic())
        self._expected = {target.model: _expected(target, details) for target in targets}
        declared = ray_config.applications(targets, self._options)
        differing = ray_config.differing(declared, details)
        failed = ray_config.failed(details)
        if failed and time.monotonic() - self._retried_at > FAILED_RETRY_SECONDS:
            # Serve leaves alone what it has given up on; left out once, it is built anew by the next call.
            logger.warning("Serve gave up on %s; starting over", ", ".join(sorted(failed)))
            self._retried_at = time.monotonic()
            _declare(controller, ray_config.without(declared, failed))
        elif differing:
            logger.info("telling Serve about %s", ", ".join(sorted(differing)))
            _declare(controller, declared)
        reason = ray_config.why_not_answering(details)
        if reason is not None:
            raise Unavailable(f"serving does not answer yet: {reason}")
        if self._ends_with_us and not self._admits:
            self._admit()

    def observe(self, models: Collection[str]) -> Mapping[str, Sequence[ReplicaReport]]:
        expected = {model: one for model, one in self._expected.items() if model in models}
        # All at once: a line that does not answer takes nothing from the others' time.
        asked = {
            model: _ask_replicas(model) for model, one in expected.items() if one.stable and one.num_running
        }
        deadline = time.monotonic() + ANSWER_SECONDS
        observed = {}
        for model, one in expected.items():
            answers = _answers(model, asked.get(model), deadline)
            offset = self._sequences.offset(model)
            reports = _reports(model, one, answers)
            observed[model] = [replace(report, sequence=report.sequence - offset) for report in reports]
        return observed

    def close(self) -> None:
        """Let go; Serve and its applications go on answering. Where Ray is about to end: until what is in flight is answered."""
        if not self._ends_with_us:
            return
        deadline = time.monotonic() + DRAIN_SECONDS
        quiet = 0
        try:
            while quiet < QUIET_LOOKS and time.monotonic() < deadline:
                quiet = 0 if sum(_tell_ingress("drain")) else quiet + 1
                time.sleep(DRAIN_LOOK_SECONDS)
        except (RayError, RayServeException, TimeoutError) as error:
            logger.warning("requests in flight may be cut off: %s", error)

    def _admit(self) -> None:
        """Once: an orchestrator before this one may have drained the ingress, and then have ended alone."""
        try:
            _tell_ingress("admit")
        except (RayError, RayServeException, TimeoutError) as error:
            raise Unavailable(f"the ingress does not answer: {error}") from error
        self._admits = True

    def _controller(self) -> Any:
        """Serve's controller. Raises Unavailable while there is none, and starts one."""
        if self._starting is not None and self._starting.is_alive():
            raise Unavailable("Serve is starting")
        try:
            return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            reason, self._start_error = self._start_error, None
            self._starting = threading.Thread(target=self._start, name="start-serve", daemon=True)
            self._starting.start()
            raise Unavailable(f"Serve is starting{f'; before: {reason}' if reason else ''}") from None

    def _start(self) -> None:
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": self._host, "port": self._port})
        except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
            logger.exception("Serve did not start")
            self._start_error = str(error)


@dataclass(frozen=True)
class _Expected:
    """What should run of a model line, and how much of it does. ``error``: why Serve has given up on replacing its replicas."""

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
    """To be called where one runs: a broadcast to nobody waits for somebody. None where it is not there after all."""
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
        logger.debug("replicas of %s do not answer: %s", model, error)
        return []
    return [answer for answer in answers if isinstance(answer, ReplicaReport)]


def _reports(model: str, expected: _Expected, answers: Sequence[ReplicaReport]) -> list[ReplicaReport]:
    """A report per replica that should run; those that have not answered in time report nothing."""
    if expected.stable is None:
        return []
    reports = list(answers)
    for position in range(len(answers), max(expected.num_replicas, expected.num_running)):
        starting = position >= expected.num_running
        reports.append(ReplicaReport(f"{model}-{position}", None, starting=starting))
    if expected.error is not None:
        why = VersionReport(expected.stable, Residence.FAILED, expected.error)
        reports.append(ReplicaReport(f"{model}-next", None, (why,), expected.sequence))
    return reports


def _tell_ingress(method: str) -> list[Any]:
    """What every replica of the ingress answers."""
    handle = serve.get_deployment_handle(INGRESS, INGRESS_APP, _check_exists=False)
    answers: list[Any] = handle.broadcast(method).results(timeout_s=INGRESS_SECONDS)
    return answers


def _declare(controller: Any, applications: Sequence[JSON]) -> None:
    _ask(controller.apply_config.remote(ServeDeploySchema.model_validate({"applications": applications})))


def _ask(reference: Any) -> Any:
    """The controller's answer. Raises Unavailable where it does not come soon."""
    try:
        return ray.get(reference, timeout=ANSWER_SECONDS)
    except GetTimeoutError as error:
        raise Unavailable("Serve's controller does not answer") from error
    except RayError as error:
        raise Unavailable(f"Serve's controller failed: {error}") from error
