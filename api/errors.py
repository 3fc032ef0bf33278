"""Renders errors as RFC 9457 problem documents, with ``code`` for programs and ``detail`` for people."""

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
from service.core.errors import DatabaseUnavailable, DiskFull, ErrorItem, PathswitchError, Unavailable

logger = logging.getLogger("pathswitch.api")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1


def problem(
    status: int,
    code: str,
    detail: str,
    errors: Iterable[ErrorItem] = (),
    headers: dict[str, str] | None = None,
) -> Response:
    """A problem response. 429 and 503 get a Retry-After header."""
    document = Problem(
        type=f"urn:pathswitch:problem:{code}",
        title=code.replace("_", " ").capitalize(),
        status=status,
        detail=detail,
        code=code,
        errors=[ProblemItem.model_validate(item) for item in errors] or None,
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


def _pathswitch_error(request: Request, error: Any) -> Response:
    """An error from our own hierarchy. Server errors are logged, except those that mean 'busy, try again'."""
    busy = isinstance(error, Unavailable) and not isinstance(error, DiskFull)
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR and not busy:
        logger.error("%s %s: %s", request.method, request.url.path, error.detail)
    return problem(error.status, error.code, error.detail, error.errors)


def _validation_error(request: Request, error: Any) -> Response:
    """FastAPI's validation errors in path, query or body."""
    items = [ErrorItem(".".join(str(part) for part in item["loc"]), item["msg"]) for item in error.errors()]
    detail = "; ".join(f"{item.location}: {item.message}" for item in items[:3])
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", detail, items)


def _http_exception(request: Request, error: Any) -> Response:
    """Errors that the framework raises: unknown route, wrong method, body too large."""
    code = _CODES.get(error.status_code, "http_error")
    detail = f"{request.method} {request.url.path}: {error.detail}"
    return problem(error.status_code, code, detail, headers=dict(error.headers or {}))


def _data_error(request: Request, error: Any) -> Response:
    """A value that is valid JSON but that the database cannot hold, such as a NUL in a free-form object."""
    detail = "the request contains a value that the database cannot store, such as a NUL character"
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", detail)


def no_database(error: DatabaseUnavailable) -> Response:
    logger.error("the database is not responding: %s", error.__cause__)
    return problem(error.status, error.code, error.detail)


def _client_disconnect(request: Request, error: Any) -> Response:
    """The client disconnected while it sent its body, so no one reads this answer."""
    return Response(status_code=HTTPStatus.BAD_REQUEST)


def _unexpected(request: Request, error: Any) -> Response:
    """A bug. The server logs the traceback, and the caller must not see it."""
    return problem(
        HTTPStatus.INTERNAL_SERVER_ERROR, "internal", "unexpected error: see the control plane's log"
    )


_CODES = {
    HTTPStatus.BAD_REQUEST: "bad_request",
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "content_too_large",
}

_HANDLERS = {
    PathswitchError: _pathswitch_error,
    RequestValidationError: _validation_error,
    HTTPException: _http_exception,
    exc.DataError: _data_error,
    DatabaseUnavailable: lambda request, error: no_database(error),
    ClientDisconnect: _client_disconnect,
    Exception: _unexpected,
}
