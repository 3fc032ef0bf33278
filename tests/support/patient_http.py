"""A patient HTTP client: during outages of the database it retries requests with the same idempotency key."""

import time
import uuid
from collections.abc import Callable, Iterator

import httpx

from api.schemas.common import BASE, IDEMPOTENCY_KEY

# Shorter than Retry-After, because at a fault rate of 1 % about ten of 100 requests are retried.
PAUSE_SECONDS = 0.05
MAX_RETRY_SECONDS = 60.0

HandleRequest = Callable[[httpx.HTTPTransport, httpx.Request], httpx.Response]


class _Replayable(httpx.SyncByteStream):
    """A streamed body that can be streamed again from its beginning."""

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._sent: list[bytes] = []
        self._rest = iter(stream)

    def __iter__(self) -> Iterator[bytes]:
        yield from list(self._sent)
        for chunk in self._rest:
            self._sent.append(chunk)
            yield chunk


def patient(send: HandleRequest) -> HandleRequest:
    """Wrap a method of httpx's transport: POSTs get an idempotency key, and transient 503s are retried."""

    def handle_request(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        if not request.url.path.startswith((BASE, "/readyz", "/metrics")):
            return send(transport, request)
        if request.method == "POST" and IDEMPOTENCY_KEY not in request.headers:
            request.headers[IDEMPOTENCY_KEY] = uuid.uuid4().hex
        assert isinstance(request.stream, httpx.SyncByteStream)
        request.stream = _Replayable(request.stream)
        deadline = time.monotonic() + MAX_RETRY_SECONDS
        retried = False
        while True:
            response = send(transport, request)
            if not _is_transient(response, retried=retried) or time.monotonic() > deadline:
                return response
            retried = True
            response.close()
            time.sleep(PAUSE_SECONDS)

    return handle_request


def _is_transient(response: httpx.Response, *, retried: bool) -> bool:
    """Whether to retry.

    `in_flight` refers to an earlier attempt, so it is an answer for retried requests only.
    """
    if response.status_code < httpx.codes.CONFLICT:
        return False
    response.read()
    if response.headers.get("Content-Type") != "application/problem+json":
        return False
    problem = response.json()
    code, parts = problem["code"], {error["location"] for error in problem.get("errors", ())}
    assert code != "internal", response.text
    # /readyz names the parts that do not answer.
    is_unavailable = code == "unavailable" and (not parts or "database" in parts)
    return is_unavailable or (code == "in_flight" and retried)
