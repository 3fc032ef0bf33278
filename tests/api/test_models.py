"""Models over HTTP."""

import pytest

from service.core.specs import ModelSpec
from tests.support.control_plane import ControlPlane


def test_a_model_has_every_default_filled_in(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name)
    answer = each_plane.http.post("/models", json={"name": name, "dataset": name})
    assert answer.status_code == 201
    model = answer.json()
    spec = ModelSpec(name=name, dataset=name).model_dump(mode="json")
    assert {key: model[key] for key in spec} == spec
    assert model["state"] == {
        "trunk_step": 0,
        "latest_version": None,
        "served_version": None,
        "update": None,
    }
    assert model["created_at"].endswith("Z")
    assert each_plane.http.get(f"/models/{name}").json() == model


def test_a_new_model_starts_with_the_newest_data_version(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name, ["a", "b"], ["c", "d"])
    each_plane.client.create_model({"name": name, "dataset": name})
    assert [update.data_version for update in each_plane.client.updates(name)] == [2]
    each_plane.client.create_model({"name": f"{name}-off", "dataset": name, "auto_update": False})
    assert list(each_plane.client.updates(f"{name}-off")) == []


def test_a_model_needs_a_dataset_and_a_free_name(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name)
    post = each_plane.http.post
    assert post("/models", json={"name": name, "dataset": "nobody"}).status_code == 404
    assert post("/models", json={"name": name, "dataset": name}).status_code == 201
    taken = post("/models", json={"name": name, "dataset": name})
    assert (taken.status_code, taken.json()["code"]) == (409, "conflict")


@pytest.mark.parametrize(
    ("body", "location"),
    [
        ({"training": {"peak_lr": 0}}, "body.training.peak_lr"),
        ({"training": {"colour": 1}}, "body.training.colour"),
        ({"branch_from": "ckp_1"}, "body.branch_from"),
        ({"paradigm": {"decay": {"shape": "steep"}}}, "body.paradigm.path_switching.decay.shape"),
        ({"architecture": {"preset": "tiny", "base": "x"}}, "body.architecture"),
        ({"gate": {"max_new_loss_increase": "much"}}, "body.gate.max_new_loss_increase"),
    ],
)
def test_errors_in_a_spec_name_the_field(
    plane: ControlPlane, name: str, body: dict[str, object], location: str
) -> None:
    answer = plane.http.post("/models", json={"name": name, "dataset": name, **body})
    assert answer.status_code == 422
    assert [item["location"] for item in answer.json()["errors"]] == [location]


def test_bases_and_tokenizers_outside_the_import_roots_are_rejected(plane: ControlPlane, name: str) -> None:
    plane.add_dataset(name)
    for outside in ({"architecture": {"base": "/etc"}}, {"tokenizer": {"path": "/etc"}}):
        answer = plane.http.post("/models", json={"name": name, "dataset": name, **outside})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert "under PATHSWITCH_IMPORT_ROOTS" in answer.json()["detail"]


def test_only_some_fields_of_a_model_can_be_changed(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name)
    each_plane.client.create_model({"name": name, "dataset": name})
    gate = {"max_old_loss_increase": 0.2, "max_backward_transfer": 0.1}
    changes = {"gate": gate, "auto_release": False, "training": {"workers": 2}}
    changed = each_plane.http.patch(f"/models/{name}", json=changes).json()
    assert changed["gate"] == {"max_new_loss_increase": 0.0, **gate}
    assert (changed["auto_release"], changed["auto_update"]) == (False, True)
    assert changed["training"]["workers"] == 2
    assert each_plane.http.get(f"/models/{name}").json() == changed
    fixed: list[dict[str, object]] = [
        {"training": {"peak_lr": 1e-3}},
        {"paradigm": {}},
        {"name": "other"},
        {"colour": 1},
    ]
    for change in fixed:
        assert each_plane.http.patch(f"/models/{name}", json=change).status_code == 409
    unset = each_plane.http.patch(f"/models/{name}", json={"gate": {"max_backward_transfer": None}})
    assert unset.json()["gate"]["max_backward_transfer"] is None
    assert each_plane.http.patch(f"/models/{name}", json={"gate": gate}).json() == changed
    for bad in ({"gate": {"colour": 1}}, {"gate": None}, {"training": 5}, {"training": {"workers": 0}}):
        assert each_plane.http.patch(f"/models/{name}", json=bad).status_code == 422
    assert each_plane.http.get(f"/models/{name}").json() == changed
    assert each_plane.http.patch("/models/nobody", json={}).status_code == 404


def test_a_model_shows_its_current_state(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name, ["a", "b"])
    each_plane.add_model(name, name)
    [checkpoint] = each_plane.http.get(f"/models/{name}/checkpoints").json()["data"]
    state = each_plane.http.get(f"/models/{name}").json()["state"]
    assert state == {
        "trunk_step": checkpoint["step"],
        "latest_version": 1,
        "served_version": 1,
        "update": None,
    }
    assert checkpoint["step"] > 0
    listed = [model for model in each_plane.client.models() if model.name == name]
    assert listed == [each_plane.client.model(name)]


def test_checkpoints_are_those_of_the_trunk(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name, ["a", "b"])
    each_plane.add_model(name, name)
    each_plane.push(name, "c", "d")
    each_plane.finish(name)
    page = each_plane.http.get(f"/models/{name}/checkpoints", params={"limit": 1}).json()
    assert page["has_more"] is True
    assert set(page["data"][0]) == {
        "id",
        "kind",
        "state",
        "step",
        "data_version",
        "sha256",
        "bytes",
        "created_at",
    }
    rows = list(each_plane.client.checkpoints(name))
    assert [(row.kind, row.state, row.data_version) for row in rows] == [
        ("trunk", "live", 1),
        ("trunk", "live", 2),
    ]
    assert rows[0].step < rows[1].step
