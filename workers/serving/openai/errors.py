"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` under an HTTP status."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from workers.serving.generation import RejectionError, RequestRejected, failed, invalid


def install(app: FastAPI) -> None:
    """Return every error of the app in OpenAI's shape, including routing and parsing errors."""

    @app.exception_handler(RejectionError)
    async def rejected(_: Request, error: RejectionError) -> JSONResponse:
        return error_response(error.rejection)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_from_validation(error).rejection)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return error_response(RequestRejected(error.status_code, message, "invalid_request_error"))

    @app.exception_handler(ClientDisconnect)
    async def disconnected(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # the client is gone; this is nginx's code for the access log

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return error_response(failed(f"unexpected {type(error).__name__}").rejection)


def error_body(rejection: RequestRejected) -> dict[str, Any]:
    return {
        "error": {
            "message": _encodable(rejection.message),
            "type": rejection.type,
            "param": None if rejection.param is None else _encodable(rejection.param),
            "code": rejection.code,
        }
    }


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON escapes in a request may contain and UTF-8 cannot encode."""
    return text.encode(errors="replace").decode()


def error_response(rejection: RequestRejected) -> JSONResponse:
    headers = {}
    if rejection.retry_after_seconds is not None:
        headers["retry-after"] = str(rejection.retry_after_seconds)
    return JSONResponse(error_body(rejection), status_code=rejection.status, headers=headers)


def _from_validation(error: RequestValidationError) -> RejectionError:
    """Report the first validation error only, as OpenAI does."""
    first = error.errors()[0]
    param = _param(first["loc"])
    match first["type"]:
        case "json_invalid":
            return invalid("We could not parse the JSON body of your request.")
        case "extra_forbidden":
            return invalid(f"Unrecognized request argument supplied: {param}", param=param)
        case "missing":
            return invalid(f"you must provide a {param or 'JSON'} parameter", param=param)
        case "rejected":
            return invalid(first["ctx"]["message"], param=first["ctx"]["param"])
        case _:
            if param is None:
                return invalid(f"The body must be a JSON object, sent as application/json: {first['msg']}")
            return invalid(f"Invalid value for '{param}': {first['msg']}", param=param)


def _param(location: Sequence[str | int]) -> str | None:
    """Name the parameter of an error: ``("body", "messages", 0, "role")`` is ``messages[0].role``.

    For other fields the rest of the location names union members and positions, which mean nothing to a
    client.
    """
    match list(location[1:]):
        case ["messages", int(position), str(field), *_]:
            return f"messages[{position}].{field}"
        case [str(field), *_]:
            return field
    return None
