"""The door of the ingress: counts the requests inside, and while it is shut lets no more in."""

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from service.core.stopping import ALL_SECONDS
from workers.serving.generation import Refused
from workers.serving.openai.errors import error_response

STOPPING = Refused(
    503, "The service is stopping", "server_error", code="service_stopping", retry_after_seconds=5
)


class Door:
    """Used from the event loop alone. ``inside`` are the requests that are being answered.

    Whoever shuts it is about to end everything. If that does not come about and nobody opens it, it opens by itself.
    """

    def __init__(self) -> None:
        self.inside = 0
        self._shut_until = float("-inf")

    @property
    def is_shut(self) -> bool:
        return time.monotonic() < self._shut_until

    def shut(self, seconds: float = ALL_SECONDS) -> None:
        """For so long, from now on."""
        self._shut_until = time.monotonic() + seconds

    def open(self) -> None:
        self._shut_until = float("-inf")


class Doorkeeper:
    """ASGI middleware around an app. A request counts until the last byte of its answer has been handed on."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._door.is_shut:
            await error_response(STOPPING)(scope, receive, send)
        else:
            self._door.inside += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._door.inside -= 1
