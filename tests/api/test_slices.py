"""Given evaluation sets over HTTP."""

import httpx

from api.client import DataFormat
from tests.support.control_plane import ControlPlane, ndjson


def give(plane: ControlPlane, dataset: str, *texts: str, **query: str | int) -> httpx.Response:
    return plane.http.post(
        f"/datasets/{dataset}/slices",
        params=query,
        content=ndjson(*texts),
        headers={"Content-Type": "application/x-ndjson"},
    )


def test_a_slice_is_created_once_and_never_changes(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name)
    first = give(each_plane, name, "a", "b", name="suite", data_version=2)
    assert first.status_code == 201
    row = first.json()
    assert row == {
        "id": row["id"],
        "dataset": name,
        "name": "suite",
        "data_version": 2,
        "documents": 2,
        "created_at": row["created_at"],
    }
    again = give(each_plane, name, "a", "b", name="suite", data_version=2)
    assert (again.status_code, again.json()) == (200, row)
    assert give(each_plane, name, "a", "c", name="suite", data_version=2).status_code == 409
    assert give(each_plane, name, "a", "b", name="suite").status_code == 409
    assert each_plane.http.get(f"/datasets/{name}/slices").json() == {"data": [row], "has_more": False}


def test_documents_of_a_slice_are_kept_out_of_new_versions(each_plane: ControlPlane, name: str) -> None:
    each_plane.add_dataset(name)
    give(each_plane, name, "a", "b", name="suite")
    answer = each_plane.push(name, "a", "b")
    assert (answer.status_code, answer.json()["code"]) == (422, "nothing_new")
    assert each_plane.push(name, "a", "c").status_code == 201


def test_bad_slices_are_refused(plane: ControlPlane, name: str) -> None:
    plane.add_dataset(name)
    assert give(plane, name, "a", name="v1").status_code == 422  # the holdout of data version 1
    assert give(plane, name, "a", name="Bad Name").status_code == 422
    assert give(plane, name, "a", name="s", data_version=0).status_code == 422
    assert give(plane, name, "a").status_code == 422
    assert give(plane, name, name="s").status_code == 422
    assert give(plane, "unknown", "a", name="s").status_code == 404
    assert plane.http.get(f"/datasets/{name}/slices").json()["data"] == []


def test_the_client_gives_slices(plane: ControlPlane, name: str) -> None:
    plane.add_dataset(name)
    path = plane.settings.import_roots[0] / f"{name}.txt"
    path.write_text("one\ftwo\fthree")
    assert plane.client.push_slice(name, "sent", [b"one"], format=DataFormat.TEXT).row.documents == 1
    assert plane.client.push_slice(name, "file", path, data_version=1).row.data_version == 1
    body, query = {"uri": path.as_uri()}, {"name": "named"}
    plane.http.post(f"/datasets/{name}/slices", params=query, json=body).raise_for_status()
    assert [row.name for row in plane.client.slices(name)] == ["sent", "file", "named"]
