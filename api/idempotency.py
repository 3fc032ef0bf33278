"""POSTs with an Idempotency-Key are carried out once; the same request again has the first answer, for a day.

The answer is kept before it is sent, so that whoever lost it on the way can ask again. What failed on our side, or
was refused before its body was read, is not kept: nothing came of it, and it may be tried again. A database that is away for
a moment is asked again for everything that would otherwise have to wait for a lease.
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

from api.deps import in_thread
from api.errors import no_database, problem
from api.schemas.common import BASE, IDEMPOTENCY_KEY
from service.core.errors import DatabaseAway
from service.store import idempotency
from service.store.database import Database, commit_guard, patiently
from service.store.idempotency import Answer, Mark, Seen, Standing

logger = logging.getLogger("pathswitch.api")

REPLAYED_HEADER = "Idempotency-Replayed"
MAX_KEY_LENGTH = 255
WAIT_SECONDS = 10.0

# What OpenAPI says of it, at every POST.
PARAMETER = {
    "name": IDEMPOTENCY_KEY,
    "in": "header",
    "required": False,
    "description": (
        "The request is carried out once; the same again has the first answer, for 24 hours. "
        "With another body or for another path: 422."
    ),
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_KEY_LENGTH},
}

_POLL_SECONDS = (0.05, 0.1, 0.2, 0.4)

# Answers of a moment: the next may be another, and nothing came of the request.
_NOT_KEPT = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})


class _Outcome(NamedTuple):
    status: int
    media_type: str | None
    messages: list[Message]
    body: bytes


class Idempotency:
    """Nearest to the application, so that limits and measurements hold for what it answers by itself too."""

    def __init__(self, app: ASGIApp, database: Database) -> None:
        self._app = app
        self._database = database

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = Headers(scope=scope).get(IDEMPOTENCY_KEY) if scope["type"] == "http" else None
        if key is None or scope["method"] != "POST" or not scope["path"].startswith(BASE):
            await self._app(scope, receive, send)
            return
        try:
            response = await self._answered(key, scope, receive, send)
        except DatabaseAway as error:
            response = no_database(error)
        except HTTPException as error:  # a body that is too large
            response = problem(error.status_code, "content_too_large", error.detail)
        if response is not None:
            await response(scope, receive, send)

    async def _answered(self, key: str, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """What to answer; None where the request was carried out, and has been answered."""
        if not (0 < len(key) <= MAX_KEY_LENGTH and key.isascii() and key.isprintable()):
            detail = f"{IDEMPOTENCY_KEY} is 1 to {MAX_KEY_LENGTH} printable ASCII characters"
            return problem(HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", detail)
        query = scope["query_string"].decode("latin-1")
        target = f"{scope['method']} {scope['path']}" + (f"?{query}" if query else "")
        owner = uuid.uuid4().hex
        seen = await self._seen(key, target, owner)
        if seen.target != target:
            return _reused(f"{IDEMPOTENCY_KEY} {key!r} was used for {seen.target}")
        if seen.standing == Standing.OURS:
            await self._carry_out(key, owner, scope, receive, send)
            return None
        if seen.standing == Standing.LOST:
            detail = (
                "the first request with this key was carried out, and its answer is lost: look what it made"
            )
            return problem(HTTPStatus.CONFLICT, "answer_lost", detail)
        if seen.answer is None:
            detail = f"the first request with {IDEMPOTENCY_KEY} {key!r} has not been answered yet"
            return problem(HTTPStatus.CONFLICT, "in_flight", detail, headers={"Retry-After": "1"})
        sha256 = await _body_sha256(receive)
        if sha256 is None:
            return None  # the client has hung up
        if sha256 != seen.answer.request_sha256:
            return _reused(f"{IDEMPOTENCY_KEY} {key!r} was used with another body")
        return Response(
            seen.answer.body,
            status_code=seen.answer.status,
            headers={REPLAYED_HEADER: "true"},
            media_type=seen.answer.media_type,
        )

    async def _seen(self, key: str, target: str, owner: str) -> Seen:
        """Claim the key, or wait for whoever has: for a while."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_SECONDS
        polls = 0
        while True:
            seen = await in_thread(partial(self._look, key))
            if seen.standing == Standing.FREE:
                seen = await in_thread(partial(patiently, partial(self._claim, key, target, owner)))
            if seen.standing != Standing.IN_FLIGHT or seen.target != target or loop.time() >= deadline:
                return seen
            await asyncio.sleep(_POLL_SECONDS[min(polls, len(_POLL_SECONDS) - 1)])
            polls += 1

    def _look(self, key: str) -> Seen:
        with self._database.reading() as session:
            return idempotency.look(session, key)

    def _claim(self, key: str, target: str, owner: str) -> Seen:
        with self._database.transaction() as session:
            return idempotency.claim(session, key, target, owner)

    async def _carry_out(self, key: str, owner: str, scope: Scope, receive: Receive, send: Send) -> None:
        answer: Answer | None = None
        try:
            async with self._renewing(key, owner):
                sha256, outcome = await self._run(key, owner, scope, receive)
            if sha256 is not None and outcome.status < 500 and outcome.status not in _NOT_KEPT:
                answer = Answer(sha256, outcome.status, outcome.media_type, outcome.body)
        finally:
            try:
                await in_thread(partial(patiently, partial(self._settle, key, owner, answer)))
            except DatabaseAway as error:
                # It was carried out or it was not, as its answer says; only whoever asks again is not told, or has to wait.
                logger.error("the answer under %r is not kept: %s", key, error.__cause__)
        for message in outcome.messages:
            await send(message)

    def _settle(self, key: str, owner: str, answer: Answer | None) -> None:
        with self._database.transaction() as session:
            if answer is not None:
                idempotency.keep_answer(session, key, owner, answer)
            else:
                idempotency.release(session, key, owner)

    async def _run(self, key: str, owner: str, scope: Scope, receive: Receive) -> tuple[str | None, _Outcome]:
        """Run the application. The hash of the body: None where it was not read to its end."""
        digest, whole = hashlib.sha256(), False
        messages: list[Message] = []

        async def hashed() -> Message:
            nonlocal whole
            message = await receive()
            if message["type"] == "http.request":
                digest.update(message.get("body", b""))
                whole = not message.get("more_body", False)
            return message

        async def captured(message: Message) -> None:
            messages.append(message)

        token = commit_guard.set(Mark(key, owner))
        try:
            await self._app(scope, hashed, captured)
        finally:
            commit_guard.reset(token)
        start = messages[0]
        # A route that takes no body has read none.
        while not whole and start["status"] < 400 and (await hashed())["type"] != "http.disconnect":
            pass
        body = b"".join(message.get("body", b"") for message in messages[1:])
        media_type = Headers(raw=start["headers"]).get("content-type")
        return digest.hexdigest() if whole else None, _Outcome(start["status"], media_type, messages, body)

    @asynccontextmanager
    async def _renewing(self, key: str, owner: str) -> AsyncIterator[None]:
        """Keep the lease while the block runs."""

        def renew() -> None:
            with self._database.transaction() as session:
                idempotency.renew(session, key, owner)

        async def keep_renewing() -> None:
            while True:
                await asyncio.sleep(idempotency.LEASE.total_seconds() / 3)
                with suppress(DatabaseAway):
                    await in_thread(renew)

        task = asyncio.create_task(keep_renewing())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _body_sha256(receive: Receive) -> str | None:
    digest = hashlib.sha256()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        digest.update(message.get("body", b""))
        if not message.get("more_body", False):
            return digest.hexdigest()


def _reused(detail: str) -> Response:
    return problem(HTTPStatus.UNPROCESSABLE_ENTITY, "idempotency_key_reused", detail)
