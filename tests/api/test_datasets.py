"""Datasets over HTTP."""

import re

import pytest

from tests.support.control_plane import ControlPlane


def test_a_dataset_is_created_and_shown(each_plane: ControlPlane, name: str) -> None:
    answer = each_plane.http.post("/datasets", json={"name": name, "description": "news, by day"})
    assert answer.status_code == 201
    created = answer.json()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", created["created_at"])
    assert created == {
        "id": created["id"],
        "name": name,
        "description": "news, by day",
        "holdout_fraction": 0.02,
        "latest_version": None,
        "created_at": created["created_at"],
    }
    assert each_plane.http.get(f"/datasets/{name}").json() == created


def test_a_taken_name_is_a_conflict(each_plane: ControlPlane, name: str) -> None:
    assert each_plane.http.post("/datasets", json={"name": name}).status_code == 201
    answer = each_plane.http.post("/datasets", json={"name": name})
    assert answer.status_code == 409
    assert answer.json()["code"] == "conflict"


@pytest.mark.parametrize(
    ("body", "location"),
    [
        ({}, "body.name"),
        ({"name": "With Spaces"}, "body.name"),
        ({"name": "-dash"}, "body.name"),
        ({"name": "x" * 64}, "body.name"),
        ({"name": "ok", "holdout_fraction": -0.1}, "body.holdout_fraction"),
        ({"name": "ok", "holdout_fraction": 1.5}, "body.holdout_fraction"),
        ({"name": "ok", "colour": "red"}, "body.colour"),
        ({"name": "ok", "description": "a\0b"}, "body.description"),
    ],
)
def test_errors_in_a_body_are_reported_by_field(
    plane: ControlPlane, body: dict[str, object], location: str
) -> None:
    answer = plane.http.post("/datasets", json=body)
    assert answer.status_code == 422
    assert [item["location"] for item in answer.json()["errors"]] == [location]


def test_an_unknown_dataset_is_not_found(plane: ControlPlane) -> None:
    for path in ("", "/versions", "/versions/1", "/slices"):
        assert plane.http.get(f"/datasets/unknown{path}").status_code == 404


def test_lists_are_paged_oldest_first(each_plane: ControlPlane, name: str) -> None:
    ids = [each_plane.client.create_dataset(f"{name}-{letter}").id for letter in "abcde"]
    first = each_plane.http.get("/datasets", params={"after": ids[0], "limit": 2}).json()
    assert [row["id"] for row in first["data"]] == ids[1:3]
    assert first["has_more"] is True
    rest = each_plane.http.get("/datasets", params={"after": ids[2], "limit": 2}).json()
    assert [row["id"] for row in rest["data"]] == ids[3:]
    assert rest["has_more"] is False
    end = each_plane.http.get("/datasets", params={"after": ids[4]}).json()
    assert end == {"data": [], "has_more": False}


def test_a_page_has_20_rows_by_default_and_at_most_100(plane: ControlPlane, name: str) -> None:
    for number in range(25):
        plane.client.create_dataset(f"{name}-{number}")
    assert len(plane.http.get("/datasets").json()["data"]) == 20
    assert plane.http.get("/datasets", params={"limit": 101}).status_code == 422
    assert plane.http.get("/datasets", params={"limit": 0}).status_code == 422
    assert plane.http.get("/datasets", params={"after": "ds_unknown"}).status_code == 422
    assert len([row for row in plane.client.datasets() if row.name.startswith(f"{name}-")]) == 25
