"""The generated OpenAPI description agrees with the contract: routes, fields and statuses.

``CONTRACT`` is the contract itself. Routes and statuses must match exactly; fields may be added, never removed.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.control_plane import ControlPlane

BASE = "/api/v1"
PROBLEM = "application/problem+json"
UPLOAD_TYPES = {"application/x-ndjson", "text/plain", "application/vnd.apache.parquet", "application/json"}

# Errors that follow from what a request has: nothing, a name in its path, validated parameters, a JSON body.
ALWAYS = {503}
NAMED = {404}
VALIDATED = {422}
POSTED = {409, 422}
BODY = {400, 409, 413, 422}
UPLOAD = {404, 409, 415, 422}

PAGE = "limit after"


@dataclass(frozen=True)
class Route:
    """One operation.

    Keys of ``request`` and ``response`` are paths of objects, values the fields of these objects.
    """

    success: set[int]
    response: dict[str, str] = field(default_factory=dict)
    errors: set[int] = field(default_factory=set)
    request: dict[str, str] = field(default_factory=dict)
    query: str = ""


def one_of_many(fields: dict[str, str]) -> dict[str, str]:
    """The fields of a page that holds such objects."""
    nested = {"data" if path == "" else f"data.{path}": names for path, names in fields.items()}
    return {"": "data has_more", **nested}


DATASET = {"": "id name description holdout_fraction latest_version created_at"}
DATA_VERSION = {
    "": "id dataset number label state excluded_at excluded_reason sha256 bytes documents duplicates "
    "holdout_documents created_at updates"
}
SLICE = {"": "id dataset name data_version documents created_at"}
DECAY = "shape floor cuts beta2 length replay_fraction replay_budget"
LENGTH = "rule fraction min max"
SPEC = {
    "": "name dataset architecture tokenizer paradigm training gate serving auto_update auto_release",
    "architecture": "preset config base",
    "tokenizer": "train path",
    "tokenizer.train": "vocab_size",
    "paradigm": "name decay schedule restart floor optimizer_state k span weights",
    "paradigm.decay": DECAY,
    "paradigm.decay.length": LENGTH,
    "training": "sequence_length batch_tokens peak_lr warmup_steps optimizer replay_mixture replay_fraction epochs "
    "precision seed workers strategy",
    "gate": "max_new_loss_increase max_old_loss_increase",
}
MODEL = SPEC | {
    "": f"id created_at state {SPEC['']}",
    "state": "trunk_step latest_version served_version update",
}
MODEL_VERSION = {
    "": "id model number data_version state update branch_point final_step parameters evaluations gate cost artifact "
    "created_at",
    "branch_point": "checkpoint step",
    "evaluations": "slice loss perplexity bits_per_byte tokens",
    "gate": "passed reasons",
    "cost": "tokens flops device_seconds",
    "artifact": "path sha256 files",
    "artifact.files": "path sha256 bytes",
}
CHECKPOINT = {"": "id kind state step data_version sha256 bytes created_at"}
UPDATE = {
    "": "id model data_version paradigm one_off branch_from state model_version branch_point final_step notes error "
    "stages created_at started_at finished_at",
    "stages": "id name kind state attempt reused needs progress error started_at finished_at",
    "stages.progress": "step total_steps loss learning_rate tokens_per_second eta_seconds",
    "stages.error": "code detail",
    "error": "code detail stage",
}
ROLLOUT = "strategy share seconds"
RELEASE = {
    "": "id model version state by reason error rollout trial requested_at begun_at tried_at promoted_at released_at "
    "retired_at",
    "rollout": ROLLOUT,
    "trial": "seconds tried served",
    "trial.tried": "requests failures first_token_seconds token_seconds loss",
}
AMOUNT = "tokens flops device_seconds"

CONTRACT = {
    "POST /datasets": Route({201}, DATASET, BODY, {"": "name description holdout_fraction"}),
    "GET /datasets": Route({200}, one_of_many(DATASET), VALIDATED, query=PAGE),
    "GET /datasets/{dataset}": Route({200}, DATASET, NAMED),
    "POST /datasets/{dataset}/versions": Route(
        {200, 201}, DATA_VERSION, UPLOAD, {"": "uri format label"}, query="label"
    ),
    "GET /datasets/{dataset}/versions": Route(
        {200}, one_of_many(DATA_VERSION), NAMED | VALIDATED, query=PAGE
    ),
    "GET /datasets/{dataset}/versions/{number}": Route({200}, DATA_VERSION, NAMED | VALIDATED),
    "POST /datasets/{dataset}/versions/{number}/exclude": Route(
        {200},
        {"": "affected_versions", "affected_versions": "model number state"},
        NAMED | BODY,
        {"": "reason"},
    ),
    "POST /datasets/{dataset}/slices": Route(
        {200, 201}, SLICE, UPLOAD, {"": "uri format"}, query="name data_version"
    ),
    "GET /datasets/{dataset}/slices": Route({200}, one_of_many(SLICE), NAMED | VALIDATED, query=PAGE),
    "POST /models": Route({201}, MODEL, NAMED | BODY, SPEC),
    "GET /models": Route({200}, one_of_many(MODEL), VALIDATED, query=PAGE),
    "GET /models/{model}": Route({200}, MODEL, NAMED),
    "PATCH /models/{model}": Route(
        {200}, MODEL, NAMED | BODY, {"": "gate serving training auto_update auto_release"}
    ),
    "GET /models/{model}/versions": Route({200}, one_of_many(MODEL_VERSION), NAMED | VALIDATED, query=PAGE),
    "GET /models/{model}/versions/{number}": Route({200}, MODEL_VERSION, NAMED),
    "GET /models/{model}/versions/{number}/files/{path}": Route({200, 206}, errors=NAMED | {416}),
    "GET /models/{model}/checkpoints": Route({200}, one_of_many(CHECKPOINT), NAMED | VALIDATED, query=PAGE),
    "GET /models/{model}/forgetting": Route(
        {200},
        {"": "slices versions loss perplexity bits_per_byte backward_transfer backward_transfers"},
        NAMED,
    ),
    "GET /models/{model}/costs": Route(
        {200},
        {
            "": "ratio_to_from_scratch versions totals from_scratch continual forecast",
            "versions": "number data_version tokens flops device_seconds reused_tokens from_scratch_tokens",
            "totals": "spent reused wasted extra",
            "totals.spent": AMOUNT,
            "totals.extra": AMOUNT,
            "from_scratch": "tokens flops",
            "continual": "tokens flops",
            "forecast": "new_tokens tokens flops device_seconds from_scratch_tokens ratio_to_from_scratch",
        },
        NAMED | VALIDATED,
        query="tokens",
    ),
    "POST /models/{model}/updates": Route(
        {202},
        UPDATE,
        NAMED | BODY,
        {"": "data_version branch_from decay paradigm", "decay": DECAY, "decay.length": LENGTH},
    ),
    "GET /models/{model}/updates": Route({200}, one_of_many(UPDATE), NAMED | VALIDATED, query=PAGE),
    "GET /updates/{update}": Route({200}, UPDATE, NAMED),
    "POST /updates/{update}/cancel": Route({200}, UPDATE, NAMED | POSTED),
    "POST /updates/{update}/retry": Route({200}, UPDATE, NAMED | POSTED),
    "GET /updates/{update}/metrics": Route(
        {200},
        {"": "data", "data": "step loss learning_rate grad_norm tokens_per_second"},
        NAMED | VALIDATED,
        query="stage",
    ),
    "GET /events": Route({200}, one_of_many({"": "id type data created_at"}), VALIDATED, query=PAGE),
    "POST /models/{model}/releases": Route(
        {202}, RELEASE, NAMED | BODY, {"": "version reason rollout", "rollout": ROLLOUT}
    ),
    "GET /models/{model}/releases": Route({200}, one_of_many(RELEASE), NAMED | VALIDATED, query=PAGE),
    "GET /models/{model}/serving": Route(
        {200},
        {
            "": "model spec version pending in_step observed_at replicas",
            "replicas": "replica version versions",
            "replicas.versions": "version state error requests failures prompt_tokens output_tokens",
        },
        NAMED,
    ),
}
HEALTH = {
    "GET /healthz": Route({200}, {"": "status"}),
    "GET /readyz": Route({200}, {"": "status parts"}, ALWAYS),
    "GET /metrics": Route({200}, errors=ALWAYS),
}
ROUTES = {name.replace(" /", f" {BASE}/"): route for name, route in CONTRACT.items()} | HEALTH
EACH_ROUTE = pytest.mark.parametrize(("name", "route"), ROUTES.items(), ids=ROUTES.keys())


@pytest.fixture(scope="module")
def description(plane: ControlPlane) -> dict[str, Any]:
    found: dict[str, Any] = plane.http.get("/openapi.json").json()
    return found


def test_the_routes_are_those_of_the_contract(description: dict[str, Any]) -> None:
    assert set(operations(description)) == ROUTES.keys()


@EACH_ROUTE
def test_the_statuses_are_those_of_the_contract(description: dict[str, Any], name: str, route: Route) -> None:
    statuses = operations(description)[name]["responses"].keys() - {"default"}
    errors = route.errors | (ALWAYS if name in ROUTES.keys() - HEALTH.keys() else set())
    assert statuses == {str(status) for status in route.success | errors}


@EACH_ROUTE
def test_every_documented_request_field_is_declared(
    description: dict[str, Any], name: str, route: Route
) -> None:
    operation = operations(description)[name]
    assert ("requestBody" in operation) == bool(route.request)
    if route.request:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert_declared(description, schema, route.request)
    query = {
        parameter["name"] for parameter in operation.get("parameters", []) if parameter.get("in") == "query"
    }
    assert query == set(route.query.split())


@EACH_ROUTE
def test_every_documented_response_field_is_declared(
    description: dict[str, Any], name: str, route: Route
) -> None:
    for status in route.success if route.response else ():
        content = operations(description)[name]["responses"][str(status)]["content"]
        assert_declared(description, content["application/json"]["schema"], route.response)


def test_every_error_is_a_problem_document(description: dict[str, Any]) -> None:
    for name, operation in operations(description).items():
        for status, response in operation["responses"].items():
            if status[0] in "45d" and status != "416":  # the answer to a bad range is Starlette's
                assert list(response["content"]) == [PROBLEM], (name, status)
    problem = {"$ref": "#/components/schemas/Problem"}
    assert_declared(
        description,
        problem,
        {"": "type title status detail code errors", "errors": "location message"},
    )


def test_operation_ids_are_short_and_unique(description: dict[str, Any]) -> None:
    ids = [operation["operationId"] for operation in operations(description).values()]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", operation_id) for operation_id in ids)


def test_every_route_is_described_in_whole_sentences(description: dict[str, Any]) -> None:
    for name, operation in operations(description).items():
        assert re.fullmatch(r"[A-Z].*\.", operation.get("description", ""), flags=re.S), name


def test_every_reference_resolves(description: dict[str, Any]) -> None:
    for reference in references(description):
        resolve(description, {"$ref": reference})


@pytest.mark.parametrize("path", ["versions", "slices"])
def test_uploads_declare_their_media_types(description: dict[str, Any], path: str) -> None:
    operation = operations(description)[f"POST {BASE}/datasets/{{dataset}}/{path}"]
    assert set(operation["requestBody"]["content"]) == UPLOAD_TYPES


def test_every_post_accepts_an_idempotency_key(description: dict[str, Any]) -> None:
    for name, operation in operations(description).items():
        named = [one.get("$ref", "").rpartition("/")[2] for one in operation.get("parameters", [])]
        assert ("Idempotency-Key" in named) == name.startswith("POST"), name


def test_the_description_can_be_read_in_a_browser(plane: ControlPlane) -> None:
    assert plane.http.get("/docs").headers["Content-Type"].startswith("text/html")


def operations(description: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    }


def assert_declared(description: dict[str, Any], schema: dict[str, Any], fields: dict[str, str]) -> None:
    for path, names in fields.items():
        objects = [schema]
        for part in path.split(".") if path else ():
            objects = properties(description, objects)[part]
        missing = set(names.split()) - properties(description, objects).keys()
        assert not missing, f"{path or 'the body'} has no {', '.join(sorted(missing))}"


def properties(description: dict[str, Any], schemas: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Properties by name, over all alternatives of the schemas, and of the items of arrays."""
    found: dict[str, list[dict[str, Any]]] = {}
    waiting = list(schemas)
    while waiting:
        schema = resolve(description, waiting.pop())
        for name, value in schema.get("properties", {}).items():
            found.setdefault(name, []).append(value)
        for kind in ("anyOf", "oneOf", "allOf"):
            waiting += schema.get(kind, [])
        if "items" in schema:
            waiting.append(schema["items"])
    return found


def resolve(description: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema that a reference leads to."""
    while "$ref" in schema:
        target: Any = description
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        schema = target
    return schema


def references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for item in value.values() for found in references(item)]
    if isinstance(value, list):
        return [found for item in value for found in references(item)]
    return []
