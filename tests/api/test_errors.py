"""Every error is a problem document, and none leaks internals."""

from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from api.main import create_app
from service.settings import Settings
from service.store.migrate import upgrade
from tests.support.control_plane import ControlPlane, ask

FIELDS = {"type", "title", "status", "detail", "code"}


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, object]:
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, object] = answer.json()
    assert set(problem) - {"errors"} == FIELDS
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["type"] == f"urn:pathswitch:problem:{code}"
    return problem


def test_every_kind_of_error_is_a_problem(each_plane: ControlPlane, name: str) -> None:
    http = each_plane.http
    each_plane.client.create_dataset(name)
    assert_problem(http.get("/datasets/nobody"), 404, "not_found")
    assert_problem(http.post("/datasets", json={"name": name}), 409, "conflict")
    assert_problem(http.get("/nothing/here"), 404, "not_found")
    assert_problem(each_plane.root.get("/"), 404, "not_found")
    refused = http.put("/datasets", json={})
    assert_problem(refused, 405, "method_not_allowed")
    assert refused.headers["Allow"]
    problem = assert_problem(http.post("/datasets", json={"name": "A", "x": 1}), 422, "invalid_request")
    errors = problem["errors"]
    assert isinstance(errors, list)
    assert {item["location"] for item in errors} == {"body.name", "body.x"}
    assert all(set(item) == {"location", "message"} for item in errors)


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b'"text"', "application/json"),
        (b"name=a", "application/x-www-form-urlencoded"),
        (b"\xff\xfe", "application/json"),
        (b"", "application/json"),
    ],
)
def test_a_body_that_is_not_a_json_object_is_invalid(
    plane: ControlPlane, content: bytes, content_type: str
) -> None:
    answer = plane.http.post("/datasets", content=content, headers={"Content-Type": content_type})
    assert answer.status_code in (400, 422)
    assert_problem(answer, answer.status_code, answer.json()["code"])


def test_bodies_above_one_mebibyte_are_refused_except_for_uploads(plane: ControlPlane) -> None:
    body = b'{"name": "a", "description": "' + b"x" * (1 << 20) + b'"}'
    answer = plane.http.post("/datasets", content=body, headers={"Content-Type": "application/json"})
    assert_problem(answer, 413, "content_too_large")
    chunks = (body[start : start + 1000] for start in range(0, len(body), 1000))
    answer = plane.http.post("/datasets", content=chunks, headers={"Content-Type": "application/json"})
    assert_problem(answer, 413, "content_too_large")


@pytest.mark.parametrize("value", ["a\0b", {"deep": ["a\0b"]}])
def test_values_that_the_database_cannot_store_are_invalid(
    each_plane: ControlPlane, name: str, value: object
) -> None:
    each_plane.client.create_dataset(name)
    body = {"name": name, "dataset": name, "architecture": {"config": {"key": value}}}
    answer = each_plane.http.post("/models", json=body)
    if answer.status_code != 201:  # SQLite can store them
        assert_problem(answer, 422, "invalid_request")


def test_an_unexpected_error_leaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path)
    upgrade(settings.database)

    def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    app = create_app(settings)
    monkeypatch.setattr("service.store.datasets.page_of_datasets", broken)
    answer = ask(app, "/api/v1/datasets")
    assert_problem(answer, 500, "internal")
    assert "secret" not in answer.text


def test_a_database_that_does_not_answer_is_503(tmp_path: Path) -> None:
    app = create_app(Settings(home=tmp_path, database_url="postgresql+psycopg://nobody@127.0.0.1:1/none"))
    answer = ask(app, "/api/v1/datasets")
    assert_problem(answer, 503, "unavailable")
    assert answer.headers["Retry-After"] == "1"


def test_an_exhausted_connection_pool_is_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise sa.exc.TimeoutError("QueuePool limit")

    app = create_app(Settings(home=tmp_path))
    monkeypatch.setattr("service.store.datasets.page_of_datasets", exhausted)
    assert_problem(ask(app, "/api/v1/datasets"), 503, "unavailable")
