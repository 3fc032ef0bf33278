"""What Serve is told, and what of its report counts as different; without any Ray."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

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


def test_only_released_lines_have_replicas_and_the_ingress_knows_them_all() -> None:
    ingress, of_line = DECLARED
    assert ingress["deployments"][0]["user_config"] == {
        "models": {
            "line": {"released": True, "sleeps": False},
            "unreleased": {"released": False, "sleeps": False},
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
