"""Limits request bodies to 1 MiB, except uploads of data, which are streamed and may have any size."""

import re
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.schemas.common import BASE

MAX_BODY_BYTES = 1 << 20
UPLOAD_PATH = re.compile(BASE + r"/datasets/[^/]+/(versions|slices)")


class BodyLimit:
    """Middleware that answers 413 while it reads a body that is too large."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or UPLOAD_PATH.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {MAX_BODY_BYTES} bytes"
                )
            return message

        await self._app(scope, receive_limited, send)
