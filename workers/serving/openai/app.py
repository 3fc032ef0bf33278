"""The OpenAI-compatible HTTP interface over a directory of models, independent of engines and Ray."""

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
    AnswerItem,
    RejectionError,
    RequestRejected,
    Started,
    parse_model_name,
    unknown_model,
    versioned_name,
)
from workers.serving.openai import errors
from workers.serving.openai.answers import JSON, ChatRendering, CompletionRendering, Rendering
from workers.serving.openai.body_limit import BodyLimit
from workers.serving.openai.directory import ModelDirectory, ServedModel
from workers.serving.openai.metrics import metrics_response
from workers.serving.openai.schemas import ChatRequest, CompletionRequest

VERSION_HEADER = "x-pathswitch-version"
AFFINITY_HEADER = "x-pathswitch-affinity"

T = TypeVar("T")


def build_app(directory: ModelDirectory) -> FastAPI:
    """Return the app that answers ``/v1`` and ``/metrics`` from ``directory``."""
    app = FastAPI(title="Pathswitch inference", docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_middleware(BodyLimit)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the served models. A model and each of its loaded versions have separate ids."""
        served = await directory.served()
        data = [
            _model_json(id, name, number)
            for name, model in sorted(served.items())
            for id, number in _model_ids(name, model).items()
        ]
        return {"object": "list", "data": data}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> Response:
        """Show a served model or one of its loaded versions."""
        name, _ = parse_model_name(model)
        served = (await directory.served()).get(name)
        if served is None or model not in (ids := _model_ids(name, served)):
            raise unknown_model(model)
        number = ids[model]
        headers = {} if number is None else _headers(number)
        return JSONResponse(_model_json(model, name, number), headers=headers)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Complete prompts of text or token ids."""
        return await _answer(directory, request, body, CompletionRendering)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Write the assistant's next message of a chat."""
        return await _answer(directory, request, body, ChatRendering)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return the metrics of all replicas in Prometheus's text format."""
        return metrics_response(await directory.metrics())

    return app


async def _answer(
    directory: ModelDirectory,
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
    # The first batch names the version, which goes into the headers.
    first = await _unless_disconnected(request, anext(batches))
    rendering = kind(
        generation.model, _started(first), num_logprobs=num_logprobs, include_usage=body.include_usage
    )
    num_choices = len(generation.prompts) * generation.n
    events = _event_stream(rendering, num_choices, first, batches)
    return StreamingResponse(events, media_type="text/event-stream", headers=_headers(rendering.number))


async def _event_stream(
    rendering: Rendering,
    num_choices: int,
    first: list[AnswerItem],
    batches: AsyncGenerator[list[AnswerItem], None],
) -> AsyncGenerator[str, None]:
    """Yield server-sent events. A failure after the first batch becomes an error event that ends the stream."""
    async with aclosing(batches):
        yield _events(rendering.opening(num_choices)) + _events(rendering.chunks(first))
        async for batch in batches:
            rejection = next((item for item in batch if isinstance(item, RequestRejected)), None)
            if rejection is not None:
                yield _events([errors.error_body(rejection)])
                return
            yield _events(rendering.chunks(batch))
        yield _events(rendering.closing()) + "data: [DONE]\n\n"


def _events(chunks: Iterable[JSON]) -> str:
    return "".join(f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n" for chunk in chunks)


async def _collect(batches: AsyncGenerator[list[AnswerItem], None]) -> list[AnswerItem]:
    async with aclosing(batches):
        return [item async for batch in batches for item in batch]


def _started(answer: list[AnswerItem]) -> Started:
    """Return the first item of an answer. Raises RejectionError if any item is a rejection."""
    for item in answer:
        if isinstance(item, RequestRejected):
            raise RejectionError(item)
    started = answer[0]
    assert isinstance(started, Started)
    return started


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, or cancel it when the client disconnects."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, disconnect], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _model_ids(name: str, served: ServedModel) -> dict[str, int | None]:
    """Map the ids of a model, its name and its name with each loaded version, to version numbers."""
    return {name: served.number} | {versioned_name(name, number): number for number in served.loaded}


def _model_json(id: str, name: str, number: int | None) -> JSON:
    return {
        "id": id,
        "object": "model",
        "created": 0,
        "owned_by": "pathswitch",
        "version": number,
        "system_fingerprint": None if number is None else versioned_name(name, number),
    }


def _headers(number: int) -> dict[str, str]:
    return {VERSION_HEADER: str(number)}
