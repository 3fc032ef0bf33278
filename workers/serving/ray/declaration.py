"""The applications declared to Serve: one for the ingress, and one per model line with a released version.

They use Serve's declarative API, where a new target only changes the user config of running replicas;
``serve.run`` would replace them all. Serve deletes declared applications that a new declaration omits, so the
Serve instance of a cluster belongs to Pathswitch.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

from pydantic import TypeAdapter

from service.core.serving import ServedTarget, ServedVersion
from service.core.serving_specs import ServingSpec

JSON = dict[str, Any]

INGRESS = "Ingress"
REPLICA = "ModelReplica"
INGRESS_APP = "ingress"

UPSCALE_SECONDS = 10.0
LOOK_BACK_SECONDS = 15.0  # Serve requires more than the 10 s between its samples

_TARGET = TypeAdapter(ServedTarget)
_VERSION: TypeAdapter[ServedVersion | None] = TypeAdapter(ServedVersion | None)

# An application in one of these states does not serve and will not recover by itself.
_GONE = ("NOT_STARTED", "DELETING")


class KnownModel(TypedDict):
    """What the ingress knows about a model line.

    ``released``: a version should answer; ``proven``: one has answered. A line that ``sleeps`` may have no
    replica until a request comes, and then loads within ``load_seconds``.
    """

    released: bool
    proven: bool
    sleeps: bool
    load_seconds: float


@dataclass(frozen=True)
class ReplicaOptions:
    """Options of every replica. ``num_cpus`` is a logical share, small enough to leave room for a trainer."""

    artifacts_url: str
    engine: Mapping[str, int | str] = field(default_factory=dict)  # options for ``engine_loader``
    num_cpus: float = 0.1
    num_gpus: float = 0.0


def app_name(model: str) -> str:
    return f"model-{model}"


def applications(targets: Sequence[ServedTarget], options: ReplicaOptions) -> list[JSON]:
    """Declare the targets. Without a released version, a model has no application of its own."""
    released = [target for target in targets if target.stable is not None]
    return [
        _ingress_app({target.model: _known_model(target) for target in targets}),
        *(_model_app(target, options) for target in released),
    ]


def declared_target(model: str, details: JSON) -> ServedTarget | None:
    """Return the target last declared for a model line, if it was declared by Pathswitch."""
    app: JSON | None = details["applications"].get(app_name(model))
    if app is None or app["status"] in _GONE or not app["deployed_app_config"]:
        return None
    try:
        return target_from_json(app["deployed_app_config"]["deployments"][0]["user_config"])
    except ValueError:
        return None


def differing(declared: Sequence[JSON], details: JSON) -> set[str]:
    """Return the names of applications that are not as declared: missing, stopping, different, or left over."""
    reported: JSON = details["applications"]
    names = {app["name"] for app in declared}
    left_over = {
        name
        for name, app in reported.items()
        if name not in names and app["source"] == "declarative" and app["status"] not in _GONE
    }
    return left_over | {
        app["name"] for app in declared if not _is_as_declared(app, reported.get(app["name"]))
    }


def failed(details: JSON) -> set[str]:
    """Return the names of applications that Serve has given up on and that have no running replica."""
    return {
        name
        for name, app in details["applications"].items()
        if app["status"] == "DEPLOY_FAILED" and "RUNNING" not in _replica_states(app)
    }


def without(declared: Sequence[JSON], names: Collection[str]) -> list[JSON]:
    return [app for app in declared if app["name"] not in names]


def unavailable_reason(details: JSON) -> str | None:
    """Say why nothing answers over HTTP at the moment; None if the ingress does."""
    proxies: JSON = details.get("proxies") or {}
    if "HEALTHY" not in {proxy["status"] for proxy in proxies.values()}:
        return "the HTTP proxy is not up"
    ingress = details["applications"].get(INGRESS_APP)
    if ingress is None or "RUNNING" not in _replica_states(ingress):
        return "the ingress is not up"
    return None


def _known_model(target: ServedTarget) -> KnownModel:
    return {
        "released": target.stable is not None,
        "proven": target.proven,
        "sleeps": target.spec.replicas.min == 0,
        "load_seconds": target.spec.limits.load_seconds,
    }


def _ingress_app(models: Mapping[str, KnownModel]) -> JSON:
    return {
        "name": INGRESS_APP,
        "route_prefix": "/",
        "import_path": "workers.serving.ray.applications:ingress_app",
        "args": {},
        "runtime_env": _runtime_env(),
        "deployments": [
            {
                "name": INGRESS,
                "user_config": {"models": dict(models)},
                "ray_actor_options": {"num_cpus": 0.1},
            }
        ],
    }


def _model_app(target: ServedTarget, options: ReplicaOptions) -> JSON:
    """Declare the replicas of a model line.

    Serve hands a changed user config to running replicas, but replaces replicas one by one when their
    arguments change. For a rolling update the arguments therefore contain the version, and nothing else of
    the target.
    """
    threads = 0 if options.num_gpus else 1
    args = {
        "artifacts_url": options.artifacts_url,
        "threads": str(threads),
        "engine": json.dumps(dict(options.engine), sort_keys=True),
    }
    if target.rolling:
        args["version"] = json.dumps(_VERSION.dump_python(target.stable, mode="json"), sort_keys=True)
    return {
        "name": app_name(target.model),
        "route_prefix": None,
        "import_path": "workers.serving.ray.applications:model_app",
        "args": args,
        "runtime_env": _runtime_env(),
        "deployments": [
            {
                "name": REPLICA,
                **_scaling(target),
                "max_surge_percent": 1,  # rounded up to one replica, which starts before an old one stops
                "user_config": target_as_json(_for_replicas(target)),
                "ray_actor_options": {"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
            }
        ],
    }


def _for_replicas(target: ServedTarget) -> ServedTarget:
    """Drop what replicas need not know: each change takes them out of routing for a moment."""
    return replace(target, spec=ServingSpec(limits=target.spec.limits), awake=True)


def _scaling(target: ServedTarget) -> JSON:
    replicas = target.spec.replicas
    minimum = max(replicas.min, 1) if target.awake else replicas.min
    if minimum == replicas.max:
        return {"num_replicas": minimum}
    return {
        "autoscaling_config": {
            "min_replicas": minimum,
            "max_replicas": replicas.max,
            "target_ongoing_requests": replicas.requests,
            "upscale_delay_s": UPSCALE_SECONDS,
            "downscale_delay_s": replicas.idle_seconds,
            "look_back_period_s": LOOK_BACK_SECONDS,
        }
    }


def target_as_json(target: ServedTarget) -> JSON:
    plain: JSON = _TARGET.dump_python(target, mode="json")
    return plain


def target_from_json(plain: Mapping[str, Any]) -> ServedTarget:
    return _TARGET.validate_python(plain)


def version_from_json(text: str) -> ServedVersion | None:
    return _VERSION.validate_json(text)


def _runtime_env() -> JSON:
    # OpenMP threads that spin while they wait halve the speed of a trainer on the same machine.
    return {
        "env_vars": {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    }


def _is_as_declared(declared: JSON, reported: JSON | None) -> bool:
    if reported is None or reported["status"] in _GONE or reported["source"] != "declarative":
        return False
    if reported["deployed_app_config"] != declared:
        return False
    # An application that is being built has no deployments yet.
    return all(
        deployment["name"] not in reported["deployments"]
        or reported["deployments"][deployment["name"]]["deployment_config"]["user_config"]
        == deployment["user_config"]
        for deployment in declared["deployments"]
    )


def _replica_states(app: JSON) -> set[str]:
    return {
        replica["state"] for deployment in app["deployments"].values() for replica in deployment["replicas"]
    }
