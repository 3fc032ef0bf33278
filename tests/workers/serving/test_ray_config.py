"""What Serve is told, and what of its report counts as different; without any cluster."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from service.core.serving import ServedTarget
from service.core.serving_specs import ReplicasSpec, RollingSpec, ServingSpec
from tests.workers.serving.serving_line import line, version
from workers.serving.ray_config import (
    ReplicaOptions,
    applications,
    declared_target,
    differing,
    failed,
    target_from_json,
    version_from_json,
    why_not_answering,
    without,
)

OPTIONS = ReplicaOptions("file:///artifacts")
TARGETS = (line(3, sequence=5), ServedTarget("unreleased", None))
DECLARED = applications(TARGETS, OPTIONS)


def reported(declared: list[dict[str, Any]]) -> dict[str, Any]:
    """Serve's report once everything declared runs."""
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


def test_only_released_lines_have_replicas_and_the_ingress_knows_them_all() -> None:
    ingress, of_line = DECLARED
    assert ingress["deployments"][0]["user_config"] == {
        "models": {
            "line": {"released": True} | KNOWN,
            "unreleased": {"released": False} | KNOWN,
        }
    }
    assert of_line["name"] == "model-line"
    config = of_line["deployments"][0]["user_config"]
    assert target_from_json(config) == TARGETS[0]


def test_a_new_version_changes_nothing_but_the_user_config_of_its_line() -> None:
    """Anything else would replace the replicas, and drop what they answer."""
    newer = applications((line(4), TARGETS[1]), OPTIONS)
    assert newer[0] == DECLARED[0]
    newer[1]["deployments"][0]["user_config"] = DECLARED[1]["deployments"][0]["user_config"]
    assert newer == DECLARED


def test_another_engine_replaces_the_replicas_and_not_the_ingress() -> None:
    other = applications(TARGETS, replace(OPTIONS, engine={"max_slots": 4, "engine": "vllm"}))
    assert other[1]["args"]["engine"] == '{"engine": "vllm", "max_slots": 4}'
    assert differing(other, reported(DECLARED)) == {"model-line"}


def test_what_replicas_need_not_know_does_not_reach_them() -> None:
    spec = ServingSpec(keep=3, replicas=ReplicasSpec(min=0, max=2), rollout=RollingSpec())
    for rolling in (False, True):
        before = replace(TARGETS[0], rolling=rolling)
        [_, told] = applications((before,), OPTIONS)
        [_, again] = applications((replace(before, spec=spec, awake=False),), OPTIONS)
        assert again["args"] == told["args"]
        assert again["deployments"][0]["user_config"] == told["deployments"][0]["user_config"]


def test_where_it_is_rolling_another_version_replaces_the_replicas_and_another_decision_does_not() -> None:
    before = replace(TARGETS[0], rolling=True)
    [_, told] = applications((before,), OPTIONS)
    [_, decided] = applications((replace(before, sequence=9, proven=True),), OPTIONS)
    [_, newer] = applications((replace(before, stable=version(4)),), OPTIONS)
    assert decided["args"] == told["args"]
    assert newer["args"] != told["args"]
    assert version_from_json(newer["args"]["version"]) == version(4)


def declared_replicas(replicas: ReplicasSpec, **rest: Any) -> dict[str, Any]:
    """The deployment of a line that is to have those."""
    target = line(3, spec=ServingSpec(replicas=replicas), **rest)
    [_, of_line] = applications((target,), OPTIONS)
    deployments: list[dict[str, Any]] = of_line["deployments"]
    assert len(deployments) == 1
    return deployments[0]


def test_as_many_replicas_as_requests_need_are_left_to_serve() -> None:
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
def test_a_fixed_number_of_replicas_is_told_as_that(number: int) -> None:
    deployment = declared_replicas(ReplicasSpec(min=number, max=number, requests=7.5))
    assert deployment["num_replicas"] == number
    assert "autoscaling_config" not in deployment


def test_a_line_that_may_sleep_keeps_a_replica_only_while_it_is_awake() -> None:
    sleepy = ReplicasSpec(min=0, max=4)
    asleep = declared_replicas(sleepy, awake=False)["autoscaling_config"]
    awake = declared_replicas(sleepy, awake=True)["autoscaling_config"]
    assert (asleep["min_replicas"], awake["min_replicas"]) == (0, 1)
    assert awake == asleep | {"min_replicas": 1}
    assert declared_replicas(ReplicasSpec(min=0, max=1))["num_replicas"] == 1
    assert declared_replicas(ReplicasSpec(min=2, max=4))["autoscaling_config"]["min_replicas"] == 2


def test_a_line_that_may_sleep_is_known_as_such_to_the_ingress() -> None:
    target = line(3, spec=ServingSpec(replicas=ReplicasSpec(min=0, max=4)))
    [ingress, _] = applications((target,), OPTIONS)
    assert ingress["deployments"][0]["user_config"]["models"]["line"]["sleeps"]


@pytest.mark.parametrize("replicas", [ReplicasSpec(), ReplicasSpec(min=0, max=4)])
@pytest.mark.parametrize("rolling", [False, True])
def test_a_next_replica_is_begun_before_an_old_one_ends(replicas: ReplicasSpec, rolling: bool) -> None:
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
def test_serve_takes_what_is_declared_and_reads_it_as_it_is_meant(
    replicas: ReplicasSpec, awake: bool
) -> None:
    target = line(3, spec=ServingSpec(replicas=replicas), awake=awake)
    declared = applications((target, TARGETS[1]), replace(OPTIONS, num_cpus=0.5, num_gpus=1.0))
    ingress, of_line = ServeDeploySchema.model_validate({"applications": declared}).applications
    assert (ingress.name, ingress.route_prefix) == ("ingress", "/")
    assert (of_line.name, of_line.route_prefix) == ("model-line", None)
    [deployment] = of_line.deployments
    written = deployment.model_dump(exclude_unset=True)
    told = declared[1]["deployments"][0]
    assert written["ray_actor_options"].items() >= told["ray_actor_options"].items()
    assert {name: written[name] for name in told.keys() - {"ray_actor_options"}} == {
        name: value for name, value in told.items() if name != "ray_actor_options"
    }
    assert deployment.is_autoscaling_configured() == ("num_replicas" not in told)
    if "autoscaling_config" in told:
        # The schema takes any mapping there; what Serve makes of it is checked when it deploys.
        scaling = AutoscalingConfig.model_validate(told["autoscaling_config"])
        assert scaling.model_dump(include=told["autoscaling_config"].keys()) == told["autoscaling_config"]


def test_what_was_declared_can_be_read_again_but_not_what_somebody_else_wrote() -> None:
    details = reported(DECLARED)
    assert declared_target("line", details) == TARGETS[0]
    assert declared_target("unreleased", details) is None
    app = details["applications"]["model-line"]
    app["deployed_app_config"]["deployments"][0]["user_config"] = {"by": "hand"}
    assert declared_target("line", details) is None
    details = reported(DECLARED)
    details["applications"]["model-line"]["status"] = "DELETING"
    assert declared_target("line", details) is None


def test_what_runs_as_declared_does_not_differ() -> None:
    assert differing(DECLARED, reported(DECLARED)) == set()
    assert why_not_answering(reported(DECLARED)) is None


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
    place = details["applications"]["model-line"]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert differing(DECLARED, details) == {"model-line"}


def test_an_application_that_is_missing_or_left_over_differs() -> None:
    assert differing(DECLARED, reported(DECLARED[:1])) == {"model-line"}
    assert differing(DECLARED[:1], reported(DECLARED)) == {"model-line"}


def test_an_application_of_someone_elses_is_let_be() -> None:
    details = reported(DECLARED)
    details["applications"]["other"] = {"status": "RUNNING", "source": "imperative"}
    assert differing(DECLARED, details) == set()


def test_an_application_that_is_being_built_does_not_differ() -> None:
    details = reported(DECLARED)
    details["applications"]["model-line"] |= {"status": "DEPLOYING", "deployments": {}}
    assert differing(DECLARED, details) == set()


def test_serve_has_given_up_where_a_failed_application_has_no_replica_left() -> None:
    details = reported(DECLARED)
    of_line = details["applications"]["model-line"]
    of_line["status"] = "DEPLOY_FAILED"
    assert failed(details) == set()
    of_line["deployments"]["ModelReplica"]["replicas"] = []
    assert failed(details) == {"model-line"}
    assert without(DECLARED, failed(details)) == DECLARED[:1]


def test_without_proxy_or_ingress_nothing_answers() -> None:
    details = reported(DECLARED)
    details["applications"]["ingress"]["deployments"]["Ingress"]["replicas"] = [{"state": "STARTING"}]
    assert why_not_answering(details) == "the ingress is not up"
    details["proxies"]["node"]["status"] = "UNHEALTHY"
    assert why_not_answering(details) == "the HTTP proxy is not up"
    assert why_not_answering({"proxies": None, "applications": {}}) is not None
