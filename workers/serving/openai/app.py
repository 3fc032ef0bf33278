"""The OpenAI-compatible HTTP interface over a directory of models; knows neither engines nor Ray."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from workers.serving.generation import (
    Answer,
    Directory,
    Refused,
    RequestRefused,
    Served,
    Started,
    fingerprint,
    named_version,
    unknown_model,
)
from workers.serving.metrics import metrics_response
from workers.serving.openai import errors
from workers.serving.openai.answers import JSON, ChatRendering, CompletionRendering, Rendering
from workers.serving.openai.body_limit import BodyLimit
from workers.serving.openai.schemas import ChatRequest, CompletionRequest

VERSION_HEADER = "x-pathswitch-version"
AFFINITY_HEADER = "x-pathswitch-affinity"

T = TypeVar("T")


def build_app(directory: Directory) -> FastAPI:
    """The app that answers ``/v1`` from ``directory``."""
    app = FastAPI(title="Pathswitch inference", docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_middleware(BodyLimit)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        served = await directory.served()
        data = [
            _model(id, name, number)
            for name, model in sorted(served.items())
            for id, number in _ids(name, model).items()
        ]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> Response:
        name, _ = named_version(model)
        served = (await directory.served()).get(name)
        if served is None or model not in _ids(name, served):
            raise unknown_model(model)
        number = _ids(name, served)[model]
        headers = {} if number is None else _headers(number)
        return JSONResponse(_model(model, name, number), headers=headers)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(directory, request, body, CompletionRendering)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _answer(directory, request, body, ChatRendering)

    @app.get("/metrics")
    async def metrics() -> Response:
        return metrics_response(await directory.metrics())

    return app


async def _answer(
    directory: Directory,
    request: Request,
    body: CompletionRequest | ChatRequest,
    kind: type[Rendering],
) -> Response:
    affinity = request.headers.get(AFFINITY_HEADER) or body.user or body.safety_identifier
    generation = replace(body.generation(), affinity=affinity)
    num_logprobs = generation.sampling.num_logprobs
    batches = directory.generate(generation)
    if not generation.stream:
        answer = await _unless_disconnected(request, _collect(batches))
        rendering = kind(generation.model, _started(answer), num_logprobs=num_logprobs, include_usage=True)
        return JSONResponse(rendering.whole(answer), headers=_headers(rendering.number))
    # The version is known with the first batch and belongs in the headers, which go out before the rest.
    first = await _unless_disconnected(request, anext(batches))
    rendering = kind(
        generation.model, _started(first), num_logprobs=num_logprobs, include_usage=body.include_usage
    )
    num_choices = len(generation.prompts) * generation.n
    events = _event_stream(rendering, num_choices, first, batches)
    return StreamingResponse(events, media_type="text/event-stream", headers=_headers(rendering.number))


async def _event_stream(
    rendering: Rendering, num_choices: int, first: list[Answer], batches: AsyncGenerator[list[Answer], None]
) -> AsyncGenerator[str, None]:
    """Server-sent events; a failure after the first batch can only be said inside the stream, and ends it."""
    async with aclosing(batches):
        yield _events(rendering.opening(num_choices)) + _events(rendering.chunks(first))
        async for batch in batches:
            refused = next((item for item in batch if isinstance(item, Refused)), None)
            if refused is not None:
                yield _events([errors.error_body(refused)])
                return
            yield _events(rendering.chunks(batch))
        yield _events(rendering.closing()) + "data: [DONE]\n\n"


def _events(chunks: Iterable[JSON]) -> str:
    return "".join(f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n" for chunk in chunks)


async def _collect(batches: AsyncGenerator[list[Answer], None]) -> list[Answer]:
    async with aclosing(batches):
        return [item async for batch in batches for item in batch]


def _started(answer: list[Answer]) -> Started:
    """The beginning of an answer. Raises RequestRefused where any item of it is a refusal."""
    for item in answer:
        if isinstance(item, Refused):
            raise RequestRefused(item)
    started = answer[0]
    assert isinstance(started, Started)
    return started


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, or cancel it when the client goes away: nobody would read the answer."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _ids(name: str, served: Served) -> dict[str, int | None]:
    """What a model can be asked by: its name, and the name with each version that is loaded."""
    return {name: served.number} | {fingerprint(name, number): number for number in served.loaded}


def _model(id: str, name: str, number: int | None) -> JSON:
    return {
        "id": id,
        "object": "model",
        "created": 0,
        "owned_by": "pathswitch",
        "version": number,
        "system_fingerprint": None if number is None else fingerprint(name, number),
    }


def _headers(number: int) -> dict[str, str]:
    return {VERSION_HEADER: str(number)}
