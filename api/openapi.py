"""Completes the OpenAPI description: streamed bodies, middleware and problems, which FastAPI cannot see."""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from api.errors import MEDIA_TYPE
from api.idempotency import PARAMETER
from api.schemas.common import BASE, IDEMPOTENCY_KEY, Problem
from api.schemas.data import LabelledSource, Source

_PROBLEM_CONTENT = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}

# Every route takes this as its default response, which also keeps FastAPI from adding its own 422.
DEFAULT_RESPONSE: dict[int | str, dict[str, Any]] = {
    "default": {"description": "Any other error", "content": _PROBLEM_CONTENT}
}

_DESCRIPTIONS = {
    400: "The body cannot be read",
    404: "No such object",
    409: "The state of the object, or a request in flight under the same key, does not allow it",
    413: "The body is too large",
    415: "The service cannot read this type or encoding of data",
    422: "A parameter or the body is invalid; nothing was stored",
    503: "A part of the service is not responding, or too many requests are waiting; try again later",
}


class ControlPlaneApp(FastAPI):
    """The FastAPI application, with a complete OpenAPI description."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is not None:
            return self.openapi_schema
        description = super().openapi()
        _, schemas = models_json_schema(
            [(Problem, "serialization"), (Source, "validation"), (LabelledSource, "validation")],
            ref_template="#/components/schemas/{model}",
        )
        description["components"]["schemas"] |= schemas["$defs"]
        description["components"].setdefault("parameters", {})[IDEMPOTENCY_KEY] = PARAMETER
        for path, methods in description["paths"].items():
            for method, operation in methods.items():
                if method == "post":
                    reference = {"$ref": f"#/components/parameters/{IDEMPOTENCY_KEY}"}
                    operation.setdefault("parameters", []).append(reference)
                for status in _problem_statuses(path, method, operation):
                    operation["responses"][str(status)] = {
                        "description": _DESCRIPTIONS[status],
                        "content": _PROBLEM_CONTENT,
                    }
        return description


def _problem_statuses(path: str, method: str, operation: dict[str, Any]) -> list[int]:
    """The errors that an operation can answer with, which follow from its method, parameters and body."""
    if path == "/healthz":
        return []
    statuses = [503]  # everything else needs the database
    if "{" in path or (path, method) == (f"{BASE}/models", "post"):  # a new model names its dataset
        statuses.append(404)
    if method in ("post", "patch") or any(map(_is_validated, operation.get("parameters", []))):
        statuses.append(422)
    if method in ("post", "patch"):
        statuses.append(409)
    if is_upload := "application/x-ndjson" in operation.get("requestBody", {}).get("content", {}):
        statuses.append(415)
    if "requestBody" in operation and not is_upload:
        statuses += [400, 413]
    return statuses


def _is_validated(parameter: dict[str, Any]) -> bool:
    """Whether a value can be invalid. Any string is valid in a path: it names an object or is not found."""
    return parameter.get("in") != "path" or parameter["schema"].get("type") != "string"
