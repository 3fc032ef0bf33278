"""Releases over HTTP: forward, back, and their history."""

import pytest

from service.core.traffic import Traffic
from tests.support.control_plane import ControlPlane


@pytest.fixture
def model(each_plane: ControlPlane, name: str) -> str:
    """A model with two versions and no automatic releases."""
    each_plane.add_dataset(name, [f"{name} a", "b"])
    each_plane.add_model(name, name, auto_release=False)
    each_plane.push(name, f"{name} c", "d")
    each_plane.finish(name)
    return name


def serve(plane: ControlPlane, model: str) -> None:
    """Run the orchestrator until the requested version is served and recorded."""
    plane.finish(model)


def test_a_version_is_released_and_rolled_back(each_plane: ControlPlane, model: str) -> None:
    path = f"/models/{model}/releases"
    answer = each_plane.http.post(path, json={"version": 1, "reason": "first light"})
    assert answer.status_code == 202
    release = answer.json()
    assert release == {
        "id": release["id"],
        "model": model,
        "version": 1,
        "state": "pending",
        "by": "user",
        "reason": "first light",
        "error": None,
        "rollout": {"strategy": "replace"},
        "trial": None,
        "requested_at": release["requested_at"],
        "begun_at": None,
        "tried_at": None,
        "promoted_at": None,
        "released_at": None,
        "retired_at": None,
    }
    serve(each_plane, model)
    again = each_plane.http.post(path, json={"version": 1}).json()
    assert (again["id"], again["state"]) == (release["id"], "live")
    each_plane.http.post(path, json={"version": 2})
    serve(each_plane, model)
    back = each_plane.http.post(path, json={"version": "previous"}).json()
    assert (back["version"], back["reason"]) == (1, "rollback")
    serve(each_plane, model)
    history = each_plane.http.get(path).json()["data"]
    assert [(row["version"], row["state"]) for row in history] == [(1, "ended"), (2, "ended"), (1, "live")]
    first, second, third = history
    assert first["released_at"] < first["retired_at"] == second["released_at"] < second["retired_at"]
    assert third["released_at"].endswith("Z")
    assert third["retired_at"] is None
    assert each_plane.client.model(model).state.served_version == 1


def test_the_last_requested_release_wins(each_plane: ControlPlane, model: str) -> None:
    overtaken = each_plane.client.release(model, 1)
    each_plane.client.release(model, 2)
    serve(each_plane, model)
    page = each_plane.http.get(f"/models/{model}/releases", params={"limit": 1}).json()
    assert (page["data"][0]["state"], page["has_more"]) == ("superseded", True)
    rows = list(each_plane.client.releases(model))
    assert [(row.version, row.state) for row in rows] == [(1, "superseded"), (2, "live")]
    assert rows[0].id == overtaken.id


def test_invalid_releases_are_refused(each_plane: ControlPlane, model: str) -> None:
    path = f"/models/{model}/releases"
    assert each_plane.http.post(path, json={"version": 3}).status_code == 404
    assert each_plane.http.post(path, json={"version": "previous"}).status_code == 409
    for bad in ({}, {"version": 0}, {"version": "latest"}, {"version": 1, "by": "me"}):
        assert each_plane.http.post(path, json=bad).status_code == 422
    assert each_plane.http.post("/models/nobody/releases", json={"version": 1}).status_code == 404
    assert each_plane.http.get(path).json() == {"data": [], "has_more": False}


def test_a_release_that_replicas_cannot_load_shows_the_error(each_plane: ControlPlane, model: str) -> None:
    each_plane.client.release(model, 1)
    serve(each_plane, model)
    each_plane.serving.broken.add(2)
    try:
        each_plane.client.release(model, 2)
        serve(each_plane, model)
    finally:
        each_plane.serving.broken.clear()
    rows = list(each_plane.client.releases(model))
    assert [(row.version, row.state, row.error) for row in rows] == [
        (1, "live", None),
        (2, "failed", "broken"),
    ]


def test_the_serving_spec_can_be_changed_field_by_field(each_plane: ControlPlane, model: str) -> None:
    path = f"/models/{model}"
    canary = {"strategy": "canary", "share": 0.2, "seconds": 60}
    changes = [
        {"limits": {"load_seconds": 30}},
        {"rollout": canary},
        {"rollout": {"share": 0.3}},
        {"keep": 2},
    ]
    for change in changes:
        assert each_plane.http.patch(path, json={"serving": change}).status_code == 200
    spec = each_plane.http.get(path).json()["serving"]
    assert (spec["limits"]["load_seconds"], spec["keep"]) == (30, 2)
    assert (spec["rollout"]["share"], spec["rollout"]["seconds"]) == (0.3, 60)
    each_plane.http.patch(path, json={"serving": {"rollout": {"strategy": "shadow"}}})
    assert each_plane.http.get(path).json()["serving"]["rollout"]["share"] == 1.0
    for bad in ({"rollout": {"share": 2}}, {"replicas": {"min": 3, "max": 1}}, {"other": 1}):
        assert each_plane.http.patch(path, json={"serving": bad}).status_code == 422


def test_a_release_can_override_the_rollout_of_the_model(each_plane: ControlPlane, model: str) -> None:
    each_plane.client.release(model, 1)
    serve(each_plane, model)
    path = f"/models/{model}/releases"
    canary = {"strategy": "canary", "share": 0.5, "seconds": 0, "min_requests": 1}
    asked = each_plane.http.post(path, json={"version": 2, "rollout": canary}).json()
    assert asked["rollout"]["share"] == 0.5
    serve(each_plane, model)
    on_trial = each_plane.http.get(path).json()["data"][-1]
    assert (on_trial["state"], on_trial["promoted_at"]) == ("pending", None)
    assert on_trial["begun_at"] <= on_trial["tried_at"]
    each_plane.serving.traffic[2] = Traffic(requests=3)
    try:
        serve(each_plane, model)
    finally:
        each_plane.serving.traffic.clear()
    live = each_plane.http.get(path).json()["data"][-1]
    assert (live["state"], live["trial"]["tried"]["requests"]) == ("live", 3)
    # Only the model decides whether replicas hold one version or several.
    rolling = {"version": 1, "rollout": {"strategy": "rolling"}}
    assert each_plane.http.post(path, json=rolling).status_code == 409
    each_plane.http.patch(f"/models/{model}", json={"serving": {"rollout": {"strategy": "rolling"}}})
    assert each_plane.http.post(path, json=rolling | {"rollout": canary}).status_code == 409


def test_serving_shows_the_desired_version_and_the_last_reports_of_replicas(
    each_plane: ControlPlane, model: str
) -> None:
    path = f"/models/{model}/serving"
    before = each_plane.http.get(path).json()
    assert (before["version"], before["in_step"], before["replicas"]) == (None, False, [])
    each_plane.client.release(model, 1)
    serve(each_plane, model)
    now = each_plane.http.get(path).json()
    assert (now["version"], now["pending"], now["in_step"]) == (1, None, True)
    [replica] = now["replicas"]
    assert (replica["version"], [held["state"] for held in replica["versions"]]) == (1, ["ready"])
    assert each_plane.http.get("/models/nobody/serving").status_code == 404
