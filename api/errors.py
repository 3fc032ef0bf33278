"""Every error as RFC 9457: ``application/problem+json`` ``code`` for programs and ``detail`` for people."""

import logging
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy import exc
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from api.schemas.common import Problem, ProblemItem
from service.core.errors import DatabaseAway, DiskFull, ErrorItem, PathswitchError, Unavailable

logger = logging.getLogger("pathswitch.api")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1

# What every route may answer besides its success, for OpenAPI.
RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {
        "description": "An error, as RFC 9457 has it",
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
}


def problem(
    status: int,
    code: str,
    detail: str,
    errors: Iterable[ErrorItem] = (),
    headers: dict[str, str] | None = None,
) -> Response:
    items = [ProblemItem(location=item.location, message=item.message) for item in errors]
    document = Problem(
        type=f"urn:pathswitch:problem:{code}",
        title=code.replace("_", " ").capitalize(),
        status=status,
        detail=detail,
        code=code,
        errors=items or None,
    )
    headers = dict(headers or {})
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
    return JSONResponse(
        document.model_dump(exclude_none=True), status_code=status, headers=headers, media_type=MEDIA_TYPE
    )


def add_handlers(app: FastAPI) -> None:
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)


def _ours(request: Request, error: Any) -> Response:
    busy = isinstance(error, Unavailable) and not isinstance(error, DiskFull)
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not busy:
        logger.error("%s %s: %s", request.method, request.url.path, error.detail)
    return problem(error.status, error.code, error.detail, error.errors)


def _invalid(request: Request, error: Any) -> Response:
    """What FastAPI found wrong with path, query or body."""
    items = [ErrorItem(".".join(str(part) for part in item["loc"]), item["msg"]) for item in error.errors()]
    detail = "; ".join(f"{item.location}: {item.message}" for item in items[:3])
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", detail, items)


def _http(request: Request, error: Any) -> Response:
    """What the framework refuses by itself: no such route or method, a body that is too large."""
    code = _CODES.get(error.status_code, "http_error")
    detail = f"{request.method} {request.url.path}: {error.detail}"
    return problem(error.status_code, code, detail, headers=dict(error.headers or {}))


def _unstorable(request: Request, error: Any) -> Response:
    """A value that is good JSON and that the database cannot hold, such as a NUL in a free-form object."""
    return problem(
        HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", "the request has a value that cannot be stored"
    )


def no_database(error: DatabaseAway) -> Response:
    logger.error("the database: %s", error.__cause__)
    return problem(error.status, error.code, error.detail)


def _gone(request: Request, error: Any) -> Response:
    """The client has hung up while it sent its body: nobody reads the answer."""
    return Response(status_code=HTTPStatus.BAD_REQUEST)


def _unexpected(request: Request, error: Any) -> Response:
    """Whoever serves the application logs the traceback; the caller learns nothing of it."""
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "an unexpected error; the log has more")


_CODES = {
    HTTPStatus.BAD_REQUEST: "bad_request",
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "content_too_large",
}

_HANDLERS = {
    PathswitchError: _ours,
    RequestValidationError: _invalid,
    HTTPException: _http,
    exc.DataError: _unstorable,
    DatabaseAway: lambda request, error: no_database(error),
    ClientDisconnect: _gone,
    Exception: _unexpected,
}
