"""The generated description agrees with the contract."""

import re
from typing import Any

import pytest

from tests.support.control_plane import ControlPlane

ROUTES = {
    "/api/v1/datasets": {"get", "post"},
    "/api/v1/datasets/{dataset}": {"get"},
    "/api/v1/datasets/{dataset}/versions": {"get", "post"},
    "/api/v1/datasets/{dataset}/versions/{number}": {"get"},
    "/api/v1/datasets/{dataset}/versions/{number}/exclude": {"post"},
    "/api/v1/datasets/{dataset}/slices": {"get", "post"},
    "/api/v1/models": {"get", "post"},
    "/api/v1/models/{model}": {"get", "patch"},
    "/api/v1/models/{model}/versions": {"get"},
    "/api/v1/models/{model}/versions/{number}": {"get"},
    "/api/v1/models/{model}/versions/{number}/files/{path}": {"get"},
    "/api/v1/models/{model}/checkpoints": {"get"},
    "/api/v1/models/{model}/forgetting": {"get"},
    "/api/v1/models/{model}/costs": {"get"},
    "/api/v1/models/{model}/updates": {"get", "post"},
    "/api/v1/models/{model}/releases": {"get", "post"},
    "/api/v1/models/{model}/serving": {"get"},
    "/api/v1/updates/{update}": {"get"},
    "/api/v1/updates/{update}/cancel": {"post"},
    "/api/v1/updates/{update}/retry": {"post"},
    "/api/v1/updates/{update}/metrics": {"get"},
    "/api/v1/events": {"get"},
    "/healthz": {"get"},
    "/readyz": {"get"},
    "/metrics": {"get"},
}


@pytest.fixture
def description(plane: ControlPlane) -> dict[str, Any]:
    found: dict[str, Any] = plane.http.get("/openapi.json").json()
    return found


def test_the_routes_are_those_of_the_contract(description: dict[str, Any]) -> None:
    assert {path: set(methods) for path, methods in description["paths"].items()} == ROUTES


def test_operation_ids_are_short_and_unique(description: dict[str, Any]) -> None:
    ids = [operation["operationId"] for operation in operations(description)]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", operation_id) for operation_id in ids)


def test_every_operation_says_that_errors_are_problems(description: dict[str, Any]) -> None:
    for operation in operations(description):
        assert list(operation["responses"]["default"]["content"]) == ["application/problem+json"]
        assert "422" not in operation["responses"]


def test_every_reference_leads_somewhere(description: dict[str, Any]) -> None:
    for reference in references(description):
        place: Any = description
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


def test_uploads_name_their_media_types(description: dict[str, Any]) -> None:
    body = description["paths"]["/api/v1/datasets/{dataset}/versions"]["post"]["requestBody"]
    assert set(body["content"]) == {
        "application/x-ndjson",
        "text/plain",
        "application/vnd.apache.parquet",
        "application/json",
    }


def test_every_post_may_carry_a_key(description: dict[str, Any]) -> None:
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            named = [one.get("$ref", "").rpartition("/")[2] for one in operation.get("parameters", [])]
            assert ("Idempotency-Key" in named) == (method == "post"), path


def test_the_description_can_be_read_in_a_browser(plane: ControlPlane) -> None:
    assert plane.http.get("/docs").headers["Content-Type"].startswith("text/html")


def operations(description: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for methods in description["paths"].values() for operation in methods.values()]


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for item in value.values() for found in references(item)]
    if isinstance(value, list):
        return [found for item in value for found in references(item)]
    return []
