"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` under an HTTP status."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from workers.serving.generation import Refused, RequestRefused, failed, invalid


def install(app: FastAPI) -> None:
    """Answer every error of the app in OpenAI's shape, those of routing and of parsing included."""

    @app.exception_handler(RequestRefused)
    async def refused(_: Request, refusal: RequestRefused) -> JSONResponse:
        return error_response(refusal.refused)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(_from_validation(error).refused)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return error_response(Refused(error.status_code, message, "invalid_request_error"))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # read by nobody; nginx's code for the access log

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return error_response(failed(f"unexpected {type(error).__name__}").refused)


def error_body(refused: Refused) -> dict[str, Any]:
    return {
        "error": {
            "message": _readable(refused.message),
            "type": refused.type,
            "param": None if refused.param is None else _readable(refused.param),
            "code": refused.code,
        }
    }


def _readable(text: str) -> str:
    """Without the halves of characters that a request may have had, and that cannot be answered with."""
    return text.encode(errors="replace").decode()


def error_response(refused: Refused) -> JSONResponse:
    headers = {}
    if refused.retry_after_seconds is not None:
        headers["retry-after"] = str(refused.retry_after_seconds)
    return JSONResponse(error_body(refused), status_code=refused.status, headers=headers)


def _from_validation(error: RequestValidationError) -> RequestRefused:
    """The first finding of the request's validation; OpenAI reports one as well."""
    finding = error.errors()[0]
    param = _param(finding["loc"])
    match finding["type"]:
        case "json_invalid":
            return invalid("We could not parse the JSON body of your request.")
        case "extra_forbidden":
            return invalid(f"Unrecognized request argument supplied: {param}", param=param)
        case "missing":
            return invalid(f"you must provide a {param or 'JSON'} parameter", param=param)
        case "refused":
            return invalid(finding["ctx"]["message"], param=finding["ctx"]["param"])
        case _:
            if param is None:
                return invalid(f"The body must be a JSON object, sent as application/json: {finding['msg']}")
            return invalid(f"Invalid value for '{param}': {finding['msg']}", param=param)


def _param(location: Sequence[str | int]) -> str | None:
    """Of ``("body", "messages", 0, "role")`` ``messages[0].role``. What follows elsewhere names union members and positions."""
    match list(location[1:]):
        case ["messages", int(position), str(field), *_]:
            return f"messages[{position}].{field}"
        case [str(field), *_]:
            return field
    return None
