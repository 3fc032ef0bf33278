"""The applications declared to Serve, and which of its reports count as different; without any cluster."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from service.core.serving import ServedTarget
from service.core.serving_specs import ReplicasSpec, RollingSpec, ServingSpec
from tests.workers.serving.serving_line import line, version
from workers.serving.ray.declaration import (
    ReplicaOptions,
    applications,
    declared_target,
    differing,
    failed,
    target_from_json,
    unavailable_reason,
    version_from_json,
    without,
)

OPTIONS = ReplicaOptions("file:///artifacts")
TARGETS = (line(3, sequence=5), ServedTarget("unreleased", None))
DECLARED = applications(TARGETS, OPTIONS)


def reported(declared: list[dict[str, Any]]) -> dict[str, Any]:
    """Return Serve's report once everything declared runs."""
    return deepcopy(
        {
            "proxies": {"node": {"status": "HEALTHY"}},
            "applications": {
                app["name"]: {
                    "status": "RUNNING",
                    "source": "declarative",
                    "deployed_app_config": app,
                    "deployments": {
                        deployment["name"]: {
                            "deployment_config": {"user_config": deployment["user_config"]},
                            "replicas": [{"state": "RUNNING"}],
                        }
                        for deployment in app["deployments"]
                    },
                }
                for app in declared
            },
        }
    )


KNOWN = {"proven": False, "sleeps": False, "load_seconds": 600}


def test_only_released_lines_have_replicas_and_the_ingress_knows_all_lines() -> None:
    ingress, line_app = DECLARED
    assert ingress["deployments"][0]["user_config"] == {
        "models": {
            "line": {"released": True} | KNOWN,
            "unreleased": {"released": False} | KNOWN,
        }
    }
    assert line_app["name"] == "model-line"
    config = line_app["deployments"][0]["user_config"]
    assert target_from_json(config) == TARGETS[0]


def test_a_new_version_changes_nothing_but_the_user_config_of_its_line() -> None:
    """Any other change would replace the replicas and cut off their requests."""
    newer = applications((line(4), TARGETS[1]), OPTIONS)
    assert newer[0] == DECLARED[0]
    newer[1]["deployments"][0]["user_config"] = DECLARED[1]["deployments"][0]["user_config"]
    assert newer == DECLARED


def test_another_engine_replaces_the_replicas_but_not_the_ingress() -> None:
    other = applications(TARGETS, replace(OPTIONS, engine={"max_slots": 4, "engine": "vllm"}))
    assert other[1]["args"]["engine"] == '{"engine": "vllm", "max_slots": 4}'
    assert differing(other, reported(DECLARED)) == {"model-line"}


def test_target_fields_that_replicas_do_not_need_do_not_reach_them() -> None:
    spec = ServingSpec(keep=3, replicas=ReplicasSpec(min=0, max=2), rollout=RollingSpec())
    for rolling in (False, True):
        before = replace(TARGETS[0], rolling=rolling)
        [_, original] = applications((before,), OPTIONS)
        [_, changed] = applications((replace(before, spec=spec, awake=False),), OPTIONS)
        assert changed["args"] == original["args"]
        assert changed["deployments"][0]["user_config"] == original["deployments"][0]["user_config"]


def test_when_rolling_another_version_replaces_the_replicas_but_another_decision_does_not() -> None:
    before = replace(TARGETS[0], rolling=True)
    [_, original] = applications((before,), OPTIONS)
    [_, decided] = applications((replace(before, sequence=9, proven=True),), OPTIONS)
    [_, newer] = applications((replace(before, stable=version(4)),), OPTIONS)
    assert decided["args"] == original["args"]
    assert newer["args"] != original["args"]
    assert version_from_json(newer["args"]["version"]) == version(4)


def declared_replicas(replicas: ReplicasSpec, **rest: Any) -> dict[str, Any]:
    """Return the deployment of a line with those replicas."""
    target = line(3, spec=ServingSpec(replicas=replicas), **rest)
    [_, line_app] = applications((target,), OPTIONS)
    deployments: list[dict[str, Any]] = line_app["deployments"]
    assert len(deployments) == 1
    return deployments[0]


def test_a_range_of_replicas_is_declared_as_autoscaling() -> None:
    deployment = declared_replicas(ReplicasSpec(min=2, max=5, requests=7.5, idle_seconds=99))
    assert "num_replicas" not in deployment
    assert deployment["autoscaling_config"] == {
        "min_replicas": 2,
        "max_replicas": 5,
        "target_ongoing_requests": 7.5,
        "upscale_delay_s": 10.0,
        "downscale_delay_s": 99,
        "look_back_period_s": 15.0,
    }


@pytest.mark.parametrize("number", [1, 3])
def test_a_fixed_number_of_replicas_is_declared_without_autoscaling(number: int) -> None:
    deployment = declared_replicas(ReplicasSpec(min=number, max=number, requests=7.5))
    assert deployment["num_replicas"] == number
    assert "autoscaling_config" not in deployment


def test_a_line_that_may_sleep_has_a_minimum_of_one_replica_only_while_awake() -> None:
    may_sleep = ReplicasSpec(min=0, max=4)
    asleep = declared_replicas(may_sleep, awake=False)["autoscaling_config"]
    awake = declared_replicas(may_sleep, awake=True)["autoscaling_config"]
    assert (asleep["min_replicas"], awake["min_replicas"]) == (0, 1)
    assert awake == asleep | {"min_replicas": 1}
    assert declared_replicas(ReplicasSpec(min=0, max=1))["num_replicas"] == 1
    assert declared_replicas(ReplicasSpec(min=2, max=4))["autoscaling_config"]["min_replicas"] == 2


def test_the_ingress_knows_which_lines_may_sleep() -> None:
    target = line(3, spec=ServingSpec(replicas=ReplicasSpec(min=0, max=4)))
    [ingress, _] = applications((target,), OPTIONS)
    assert ingress["deployments"][0]["user_config"]["models"]["line"]["sleeps"]


@pytest.mark.parametrize("replicas", [ReplicasSpec(), ReplicasSpec(min=0, max=4)])
@pytest.mark.parametrize("rolling", [False, True])
def test_a_new_replica_starts_before_an_old_one_stops(replicas: ReplicasSpec, rolling: bool) -> None:
    assert declared_replicas(replicas, rolling=rolling)["max_surge_percent"] == 1


@pytest.mark.parametrize(
    "replicas",
    [
        ReplicasSpec(min=3, max=3),
        ReplicasSpec(min=2, max=5, requests=7.5, idle_seconds=99),
        ReplicasSpec(min=0, max=1, idle_seconds=0),
        ReplicasSpec(min=0, max=1024, requests=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("awake", [False, True])
def test_serve_parses_the_declaration_as_intended(replicas: ReplicasSpec, awake: bool) -> None:
    target = line(3, spec=ServingSpec(replicas=replicas), awake=awake)
    declared = applications((target, TARGETS[1]), replace(OPTIONS, num_cpus=0.5, num_gpus=1.0))
    ingress, line_app = ServeDeploySchema.model_validate({"applications": declared}).applications
    assert (ingress.name, ingress.route_prefix) == ("ingress", "/")
    assert (line_app.name, line_app.route_prefix) == ("model-line", None)
    [deployment] = line_app.deployments
    written = deployment.model_dump(exclude_unset=True)
    original = declared[1]["deployments"][0]
    assert written["ray_actor_options"].items() >= original["ray_actor_options"].items()
    assert {name: written[name] for name in original.keys() - {"ray_actor_options"}} == {
        name: value for name, value in original.items() if name != "ray_actor_options"
    }
    assert deployment.is_autoscaling_configured() == ("num_replicas" not in original)
    if "autoscaling_config" in original:
        # The schema accepts any mapping here; Serve validates it only when it deploys.
        scaling = AutoscalingConfig.model_validate(original["autoscaling_config"])
        assert (
            scaling.model_dump(include=original["autoscaling_config"].keys())
            == original["autoscaling_config"]
        )


def test_a_declared_target_can_be_read_back_but_a_foreign_config_cannot() -> None:
    details = reported(DECLARED)
    assert declared_target("line", details) == TARGETS[0]
    assert declared_target("unreleased", details) is None
    app = details["applications"]["model-line"]
    app["deployed_app_config"]["deployments"][0]["user_config"] = {"by": "hand"}
    assert declared_target("line", details) is None
    details = reported(DECLARED)
    details["applications"]["model-line"]["status"] = "DELETING"
    assert declared_target("line", details) is None


def test_applications_that_run_as_declared_do_not_differ() -> None:
    assert differing(DECLARED, reported(DECLARED)) == set()
    assert unavailable_reason(reported(DECLARED)) is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("status",), "DELETING"),
        (("source",), "imperative"),
        (("deployed_app_config",), None),
        (("deployed_app_config", "args", "artifacts_url"), "file:///elsewhere"),
        (
            ("deployments", "ModelReplica", "deployment_config", "user_config"),
            {"sequence": 4, "target": {}},
        ),
    ],
)
def test_an_application_that_was_changed_differs(path: tuple[str, ...], value: Any) -> None:
    details = reported(DECLARED)
    parent = details["applications"]["model-line"]
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = value
    assert differing(DECLARED, details) == {"model-line"}


def test_an_application_that_is_missing_or_left_over_differs() -> None:
    assert differing(DECLARED, reported(DECLARED[:1])) == {"model-line"}
    assert differing(DECLARED[:1], reported(DECLARED)) == {"model-line"}


def test_an_imperatively_deployed_application_is_left_alone() -> None:
    details = reported(DECLARED)
    details["applications"]["other"] = {"status": "RUNNING", "source": "imperative"}
    assert differing(DECLARED, details) == set()


def test_an_application_that_is_being_built_does_not_differ() -> None:
    details = reported(DECLARED)
    details["applications"]["model-line"] |= {"status": "DEPLOYING", "deployments": {}}
    assert differing(DECLARED, details) == set()


def test_an_application_has_failed_only_when_it_has_no_running_replica() -> None:
    details = reported(DECLARED)
    line_app = details["applications"]["model-line"]
    line_app["status"] = "DEPLOY_FAILED"
    assert failed(details) == set()
    line_app["deployments"]["ModelReplica"]["replicas"] = []
    assert failed(details) == {"model-line"}
    assert without(DECLARED, failed(details)) == DECLARED[:1]


def test_serving_is_unavailable_without_proxy_or_ingress() -> None:
    details = reported(DECLARED)
    details["applications"]["ingress"]["deployments"]["Ingress"]["replicas"] = [{"state": "STARTING"}]
    assert unavailable_reason(details) == "the ingress is not up"
    details["proxies"]["node"]["status"] = "UNHEALTHY"
    assert unavailable_reason(details) == "the HTTP proxy is not up"
    assert unavailable_reason({"proxies": None, "applications": {}}) is not None
