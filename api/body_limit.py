"""Bodies are small JSON and are read whole, but for data, which is streamed and may have any size."""

import re
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.schemas.common import BASE

MAX_BODY_BYTES = 1 << 20
STREAMED = re.compile(BASE + r"/datasets/[^/]+/(versions|slices)")


class BodyLimit:
    """Ends the reading of a body that is too large: 413."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or STREAMED.fullmatch(scope["path"]):
            await self._app(scope, receive, send)
            return
        left = MAX_BODY_BYTES

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {MAX_BODY_BYTES} bytes"
                )
            return message

        await self._app(scope, counted, send)
