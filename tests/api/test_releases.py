"""Releases over HTTP: forward, back, and the history of both."""

import pytest

from tests.support.control_plane import ControlPlane


@pytest.fixture
def model(each_plane: ControlPlane, name: str) -> str:
    """A model with two versions, none of them released by itself."""
    each_plane.add_dataset(name, [f"{name} a", "b"])
    each_plane.add_model(name, name, auto_release=False)
    each_plane.push(name, f"{name} c", "d")
    each_plane.finish(name)
    return name


def serve(plane: ControlPlane, model: str) -> None:
    """One tick has what was asked for served, and written down."""
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


def test_the_last_one_asked_for_wins(each_plane: ControlPlane, model: str) -> None:
    overtaken = each_plane.client.release(model, 1)
    each_plane.client.release(model, 2)
    serve(each_plane, model)
    page = each_plane.http.get(f"/models/{model}/releases", params={"limit": 1}).json()
    assert (page["data"][0]["state"], page["has_more"]) == ("superseded", True)
    rows = list(each_plane.client.releases(model))
    assert [(row.version, row.state) for row in rows] == [(1, "superseded"), (2, "live")]
    assert rows[0].id == overtaken.id


def test_what_cannot_be_released(each_plane: ControlPlane, model: str) -> None:
    path = f"/models/{model}/releases"
    assert each_plane.http.post(path, json={"version": 3}).status_code == 404
    assert each_plane.http.post(path, json={"version": "previous"}).status_code == 409
    for bad in ({}, {"version": 0}, {"version": "latest"}, {"version": 1, "by": "me"}):
        assert each_plane.http.post(path, json=bad).status_code == 422
    assert each_plane.http.post("/models/nobody/releases", json={"version": 1}).status_code == 404
    assert each_plane.http.get(path).json() == {"data": [], "has_more": False}


def test_a_version_that_replicas_cannot_load_says_why(each_plane: ControlPlane, model: str) -> None:
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
