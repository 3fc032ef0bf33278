"""Draining of the ingress: requests in flight are answered, new ones are rejected."""

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from service.core.stopping import ALL_SECONDS
from workers.serving.generation import RequestRejected
from workers.serving.openai.errors import error_response

STOPPING = RequestRejected(
    503, "The service is stopping", "server_error", code="service_stopping", retry_after_seconds=5
)


class DrainState:
    """Counts requests in flight and decides whether to reject new ones. Use it only on the event loop.

    The caller that starts draining is about to stop everything; if it dies first, draining ends by itself.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self._drains_until = float("-inf")

    @property
    def draining(self) -> bool:
        return time.monotonic() < self._drains_until

    def start(self, seconds: float = ALL_SECONDS) -> None:
        """Reject new requests for ``seconds`` from now on."""
        self._drains_until = time.monotonic() + seconds

    def stop(self) -> None:
        """Accept requests again."""
        self._drains_until = float("-inf")


class DrainMiddleware:
    """ASGI middleware that applies a DrainState. A request is in flight until its last byte has been sent."""

    def __init__(self, app: ASGIApp, state: DrainState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._state.draining:
            await error_response(STOPPING)(scope, receive, send)
        else:
            self._state.in_flight += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._state.in_flight -= 1
