"""How large a request may be: it is read whole, by the one process that answers for every model."""

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 16 << 20  # a prompt of a million tokens, and room for a few


class BodyLimit:
    """ASGI middleware that ends the reading of a body that is larger: 413."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = MAX_BODY_BYTES

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"The body is larger than {MAX_BODY_BYTES} bytes")
            return message

        await self._app(scope, counted, send)
