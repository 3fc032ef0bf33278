"""The serving port over Ray Serve: one application for the ingress, one for every model line.

The process that uses it is a driver (``ray.init`` was called). Serve's applications are detached: they outlive it, and the
next one finds them as they are, since deploying what is deployed already changes nothing.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from service.core.errors import Unavailable
from service.core.serving import ReplicaReport, ServedTarget
from workers.serving.ray_deployments import (
    INGRESS_APP,
    Ingress,
    ModelReplica,
    app_name,
    build_ingress,
    model_names,
)

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
REPLICA_GPUS = 0.2  # beside a trainer and the stage host on the same GPU

_DEPLOYMENT_OPTIONS: Mapping[str, Any] = {
    "num_replicas": 1,
    "max_ongoing_requests": 256,  # the engine has a queue of its own, and refuses with a 429 beyond it
    "graceful_shutdown_timeout_s": 120,  # long streams end by themselves
    "health_check_period_s": 5,
    "health_check_timeout_s": 30,
}
# A replica computes on one thread: a second one that waits in OpenMP halves the speed of a trainer beside it.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


class RayServing:
    """Serves on ``host`` and ``port`` of the head node's proxy."""

    def __init__(self, artifacts_url: str, host: str, port: int) -> None:
        self._artifacts_url = artifacts_url
        self._host, self._port = host, port
        self._applied: dict[str, ServedTarget] = {}
        self._started = False

    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    def apply(self, targets: Sequence[ServedTarget]) -> None:
        try:
            self._apply({target.model: target for target in targets})
        except (RayError, RayServeException, ConnectionError) as error:
            self._started = False
            raise Unavailable(f"Serve does not answer: {error}") from error

    def observe(self) -> Mapping[str, Sequence[ReplicaReport]]:
        """One report per model line: each has one replica."""
        return {model: [self._report(model)] for model in self._applied}

    def close(self) -> None:
        """What is deployed goes on answering."""

    def _apply(self, targets: dict[str, ServedTarget]) -> None:
        if not self._started:
            serve.start(proxy_location="HeadOnly", http_options={"host": self._host, "port": self._port})
            self._started = True
        running = serve.status().applications
        if INGRESS_APP not in running:
            _run(self._ingress(), INGRESS_APP, "/")
        for target in targets.values():
            if self._applied.get(target.model) != target or app_name(target.model) not in running:
                logger.info("%s: version %s is desired", target.model, target.number)
                _run(self._model(target), app_name(target.model), None)
                self._applied[target.model] = target
        for model in model_names(running):
            if model not in targets:
                serve.delete(app_name(model), _blocking=False)
                self._applied.pop(model, None)

    def _report(self, model: str) -> ReplicaReport:
        try:
            handle = serve.get_app_handle(app_name(model))
            report: ReplicaReport = handle.report.remote().result(timeout_s=ANSWER_SECONDS)
            return report
        except (RayError, RayServeException, TimeoutError) as error:
            logger.info("%s does not answer yet: %s", model, error)
            return ReplicaReport(model, None)

    def _ingress(self) -> Any:
        deployment = serve.deployment(serve.ingress(build_ingress)(Ingress))
        return deployment.options(
            name="ingress", ray_actor_options=_actor_options(cpus=0.1, gpus=0), **_DEPLOYMENT_OPTIONS
        ).bind()

    def _model(self, target: ServedTarget) -> Any:
        gpus = REPLICA_GPUS if ray.cluster_resources().get("GPU") else 0
        return (
            serve.deployment(ModelReplica)
            .options(
                name="replica",
                user_config={"number": target.number, "key": target.key},
                ray_actor_options=_actor_options(cpus=0.1, gpus=gpus),
                **_DEPLOYMENT_OPTIONS,
            )
            .bind(self._artifacts_url, 0 if gpus else 1)
        )


def _actor_options(*, cpus: float, gpus: float) -> dict[str, Any]:
    return {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": _ENVIRONMENT}}


def _run(application: Any, name: str, route_prefix: str | None) -> None:
    """Deploy without waiting for replicas: the next observation tells."""
    serve.run_many(
        [serve.RunTarget(application, name=name, route_prefix=route_prefix)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
