"""Forgetting over HTTP."""

import pytest

from tests.support.control_plane import ControlPlane, ndjson


def test_a_new_model_has_an_empty_matrix_and_an_unknown_one_is_not_found(
    each_plane: ControlPlane, name: str
) -> None:
    each_plane.add_dataset(name, [f"{name} a", "b"])
    assert each_plane.http.get(f"/models/{name}/forgetting").status_code == 404
    each_plane.client.create_model({"name": name, "dataset": name, "auto_update": False})
    assert each_plane.http.get(f"/models/{name}/forgetting").json() == {
        "slices": [],
        "versions": [],
        "loss": [],
        "perplexity": [],
        "bits_per_byte": [],
        "backward_transfer": None,
        "backward_transfers": [],
    }


def test_matrices_have_a_row_per_version_and_a_column_per_slice(
    each_plane: ControlPlane, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    each_plane.add_dataset(name, [f"{name} a", "b"])
    each_plane.add_model(name, name)
    each_plane.push(name, f"{name} c", "d")
    monkeypatch.setattr(each_plane.executor, "losses", lambda slice_name: 3.03125)
    each_plane.finish(name)
    # The served version is also measured on newer slices.
    assert each_plane.http.get(f"/models/{name}/forgetting").json() == {
        "slices": ["v1", "v2"],
        "versions": [1, 2],
        "loss": [[3.0, 3.03125], [3.03125, 3.03125]],
        "perplexity": [[20.0, 20.0], [20.0, 20.0]],
        "bits_per_byte": [[1.0, 1.0], [1.0, 1.0]],
        "backward_transfer": 0.03125,
        "backward_transfers": [None, 0.03125],
    }


def test_uploaded_slices_come_last_and_count_only_if_they_have_a_data_version(
    plane: ControlPlane, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane.add_dataset(name, [f"{name} a", "b"])
    for slice_name, query in (("suite", {}), ("about-v1", {"data_version": 1})):
        created = plane.http.post(
            f"/datasets/{name}/slices",
            params={"name": slice_name, **query},
            content=ndjson(f"{name} {slice_name}"),
            headers={"Content-Type": "application/x-ndjson"},
        )
        assert created.status_code == 201, created.text
    plane.add_model(name, name)
    plane.push(name, f"{name} c", "d")
    losses = {"suite": 9.0, "about-v1": 3.0}
    monkeypatch.setattr(plane.executor, "losses", lambda slice_name: losses.get(slice_name, 3.25))
    plane.finish(name)
    found = plane.client.forgetting(name)
    assert found.slices == ["v1", "v2", "suite", "about-v1"]
    assert found.loss[1] == [3.25, 3.25, 9.0, 3.0]
    assert found.backward_transfer == (0.25 + 0.0) / 2
