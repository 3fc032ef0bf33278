"""Middleware that processes a POST with an Idempotency-Key only once, and replays its response for a day.

The response is stored before it is sent, so a client that did not receive it can retry. Server errors, and
rejections made before the body was read, are not stored, because the request changed nothing and can be
retried. During a short outage of the database, the middleware retries its own transactions, because otherwise
the next attempt would have to wait until the lease expires.
"""

import asyncio
import hashlib
import logging
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from http import HTTPStatus
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.deps import REQUEST_DATABASE, in_thread
from api.errors import no_database, problem
from api.schemas.common import BASE, IDEMPOTENCY_KEY
from service.core.errors import DatabaseUnavailable
from service.store import idempotency
from service.store.database import Database, retry_while_unavailable
from service.store.idempotency import Answer, KeyState, KeyStatus, MarkedDatabase

logger = logging.getLogger("pathswitch.api")

REPLAYED_HEADER = "Idempotency-Replayed"
MAX_KEY_LENGTH = 255
WAIT_SECONDS = 10.0

# The OpenAPI parameter of every POST.
PARAMETER = {
    "name": IDEMPOTENCY_KEY,
    "in": "header",
    "required": False,
    "description": (
        "The request is processed once. Repeating it within 24 hours returns the first response. "
        "Reusing the key with a different body or path returns 422."
    ),
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_LENGTH},
}

_POLL_SECONDS = (0.05, 0.1, 0.2, 0.4)

# Not stored: the request changed nothing, and the next attempt may succeed.
_NOT_KEPT = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})


class _CapturedResponse(NamedTuple):
    status: int
    media_type: str | None
    messages: list[Message]
    body: bytes


class Idempotency:
    """Must be the innermost middleware, so that limits and metrics also cover responses that it sends itself."""

    def __init__(self, app: ASGIApp, database: Database) -> None:
        self._app = app
        self._database = database

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = Headers(scope=scope).get(IDEMPOTENCY_KEY) if scope["type"] == "http" else None
        if key is None or scope["method"] != "POST" or not scope["path"].startswith(BASE):
            await self._app(scope, receive, send)
            return
        try:
            response = await self._handle(key, scope, receive, send)
        except DatabaseUnavailable as error:
            response = no_database(error)
        except HTTPException as error:  # a body that is too large
            response = problem(error.status_code, "content_too_large", error.detail)
        if response is not None:
            await response(scope, receive, send)

    async def _handle(self, key: str, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """The response to send; None if the request was carried out and has been answered."""
        if not (0 < len(key) <= MAX_KEY_LENGTH and key.isascii() and key.isprintable()):
            detail = f"{IDEMPOTENCY_KEY} must be 1 to {MAX_KEY_LENGTH} printable ASCII characters"
            return problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", detail)
        query = scope["query_string"].decode("latin-1")
        target = f"{scope['method']} {scope['path']}" + (f"?{query}" if query else "")
        owner = uuid.uuid4().hex
        status = await self._claim_or_wait(key, target, owner)
        if status.target != target:
            return _key_reused(f"{IDEMPOTENCY_KEY} {key!r} was used for {status.target}")
        if status.state == KeyState.OURS:
            await self._carry_out(key, owner, scope, receive, send)
            return None
        if status.state == KeyState.LOST:
            detail = (
                "the first request with this key was processed, but its response was lost: look up the result"
            )
            return problem(HTTPStatus.CONFLICT, "answer_lost", detail)
        if status.answer is None:
            detail = f"the first request with {IDEMPOTENCY_KEY} {key!r} has not been answered yet: try again"
            return problem(HTTPStatus.CONFLICT, "in_flight", detail, headers={"Retry-After": "1"})
        sha256 = await _body_sha256(receive)
        if sha256 is None:
            return None  # the client has hung up
        if sha256 != status.answer.request_sha256:
            return _key_reused(f"{IDEMPOTENCY_KEY} {key!r} was used with another body")
        return Response(
            status.answer.body,
            status_code=status.answer.status,
            headers={REPLAYED_HEADER: "true"},
            media_type=status.answer.media_type,
        )

    async def _claim_or_wait(self, key: str, target: str, owner: str) -> KeyStatus:
        """Claim the key, or wait up to WAIT_SECONDS for the request that holds it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_SECONDS
        num_polls = 0
        while True:
            status = await in_thread(partial(self._look_up, key))
            if status.state == KeyState.FREE:
                claim = partial(self._claim, key, target, owner)
                status = await in_thread(partial(retry_while_unavailable, claim))
            if status.state != KeyState.IN_FLIGHT or status.target != target or loop.time() >= deadline:
                return status
            await asyncio.sleep(_POLL_SECONDS[min(num_polls, len(_POLL_SECONDS) - 1)])
            num_polls += 1

    def _look_up(self, key: str) -> KeyStatus:
        with self._database.reading() as session:
            return idempotency.look_up(session, key)

    def _claim(self, key: str, target: str, owner: str) -> KeyStatus:
        with self._database.transaction() as session:
            return idempotency.claim(session, key, target, owner)

    async def _carry_out(self, key: str, owner: str, scope: Scope, receive: Receive, send: Send) -> None:
        answer: Answer | None = None
        try:
            async with self._keep_lease(key, owner):
                sha256, response = await self._run_app(key, owner, scope, receive)
            if sha256 is not None and response.status < 500 and response.status not in _NOT_KEPT:
                answer = Answer(sha256, response.status, response.media_type, response.body)
        finally:
            settle = partial(self._keep_or_release, key, owner, answer)
            try:
                await in_thread(partial(retry_while_unavailable, settle))
            except DatabaseUnavailable as error:
                # This response is still correct; only a repeated request has to wait, or gets 409 answer_lost.
                logger.error("cannot store the answer for Idempotency-Key %r: %s", key, error.__cause__)
        for message in response.messages:
            await send(message)

    def _keep_or_release(self, key: str, owner: str, answer: Answer | None) -> None:
        with self._database.transaction() as session:
            if answer is not None:
                idempotency.keep_answer(session, key, owner, answer)
            else:
                idempotency.release(session, key, owner)

    async def _run_app(
        self, key: str, owner: str, scope: Scope, receive: Receive
    ) -> tuple[str | None, _CapturedResponse]:
        """Run the application. Returns the hash of the body, or None if it was not read to its end."""
        digest, is_complete = hashlib.sha256(), False
        messages: list[Message] = []

        async def receive_hashed() -> Message:
            nonlocal is_complete
            message = await receive()
            if message["type"] == "http.request":
                digest.update(message.get("body", b""))
                is_complete = not message.get("more_body", False)
            return message

        async def capture(message: Message) -> None:
            messages.append(message)

        marked = MarkedDatabase(self._database, key, owner)
        await self._app({**scope, REQUEST_DATABASE: marked}, receive_hashed, capture)
        start = messages[0]
        # A route without a body parameter has not read the body.
        while not is_complete and start["status"] < 400:
            if (await receive_hashed())["type"] == "http.disconnect":
                break
        body = b"".join(message.get("body", b"") for message in messages[1:])
        media_type = Headers(raw=start["headers"]).get("content-type")
        response = _CapturedResponse(start["status"], media_type, messages, body)
        return digest.hexdigest() if is_complete else None, response

    @asynccontextmanager
    async def _keep_lease(self, key: str, owner: str) -> AsyncIterator[None]:
        """Renew the lease for as long as the block runs."""
        task = asyncio.create_task(self._renew_forever(key, owner))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _renew_forever(self, key: str, owner: str) -> None:
        while True:
            await asyncio.sleep(idempotency.LEASE.total_seconds() / 3)
            with suppress(DatabaseUnavailable):
                await in_thread(partial(self._renew, key, owner))

    def _renew(self, key: str, owner: str) -> None:
        with self._database.transaction() as session:
            idempotency.renew(session, key, owner)


async def _body_sha256(receive: Receive) -> str | None:
    """Hash of the rest of the body; None if the client hangs up."""
    digest = hashlib.sha256()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        digest.update(message.get("body", b""))
        if not message.get("more_body", False):
            return digest.hexdigest()


def _key_reused(detail: str) -> Response:
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, "idempotency_key_reused", detail)
