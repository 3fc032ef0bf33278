"""What a well-behaved client does where the service has no database for a moment: the same again, under the same key."""

import time
import uuid
from collections.abc import Callable, Iterator

import httpx

from api.schemas.common import BASE, IDEMPOTENCY_KEY

# Instead of the second that Retry-After asks for: of 100 requests at a fault rate of 1 %, some ten are answered so.
PAUSE_SECONDS = 0.05
PATIENCE_SECONDS = 60.0

HandleRequest = Callable[[httpx.HTTPTransport, httpx.Request], httpx.Response]


class _Replayable(httpx.SyncByteStream):
    """A body that is streamed, and that can be streamed again from its beginning."""

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._sent: list[bytes] = []
        self._rest = iter(stream)

    def __iter__(self) -> Iterator[bytes]:
        yield from list(self._sent)
        for chunk in self._rest:
            self._sent.append(chunk)
            yield chunk


def patient(send: HandleRequest) -> HandleRequest:
    """Around the method of httpx's transport: POSTs get a key, and what is answered with 503 for a moment is sent again."""

    def handle_request(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        if not request.url.path.startswith((BASE, "/readyz", "/metrics")):
            return send(transport, request)
        if request.method == "POST" and IDEMPOTENCY_KEY not in request.headers:
            request.headers[IDEMPOTENCY_KEY] = uuid.uuid4().hex
        assert isinstance(request.stream, httpx.SyncByteStream)
        request.stream = _Replayable(request.stream)
        deadline = time.monotonic() + PATIENCE_SECONDS
        asked_again = False
        while True:
            response = send(transport, request)
            if not _comes_again(response, asked_again=asked_again) or time.monotonic() > deadline:
                return response
            asked_again = True
            response.close()
            time.sleep(PAUSE_SECONDS)

    return handle_request


def _comes_again(response: httpx.Response, *, asked_again: bool) -> bool:
    """Whether the answer is one of a moment. That a first request is at it yet is only told to whoever has sent one."""
    if response.status_code < httpx.codes.CONFLICT:
        return False
    response.read()
    if response.headers.get("Content-Type") != "application/problem+json":
        return False
    problem = response.json()
    code, parts = problem["code"], {error["location"] for error in problem.get("errors", ())}
    assert code != "internal", response.text
    away = code == "unavailable" and (not parts or "database" in parts)  # /readyz names what does not answer
    return away or (code == "in_flight" and asked_again)
