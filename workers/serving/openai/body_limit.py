"""Limit on the size of a request body, which the one ingress process for all models reads whole."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 16 << 20  # a prompt of a million tokens, with some room


class BodyLimit:
    """ASGI middleware that rejects a larger body with 413 as soon as the limit is passed."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        remaining = MAX_BODY_BYTES

        async def receive_limited() -> Message:
            nonlocal remaining
            message = await receive()
            remaining -= len(message.get("body", b""))
            if remaining < 0:
                raise HTTPException(413, f"The body is larger than {MAX_BODY_BYTES} bytes")
            return message

        await self._app(scope, receive_limited, send)
