"""Draining of the ingress: requests in flight are answered, new ones are rejected."""

import asyncio
from collections.abc import AsyncIterator

import httpx
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from workers.serving.openai.draining import DrainMiddleware, DrainState


def app_with(state: DrainState, finish: asyncio.Event) -> FastAPI:
    """Return an app with one stream that ends once ``finish`` is set."""
    app = FastAPI()
    app.add_middleware(DrainMiddleware, state=state)

    async def words() -> AsyncIterator[str]:
        yield "first "
        await finish.wait()
        yield "last"

    @app.get("/")
    async def stream() -> StreamingResponse:
        return StreamingResponse(words())

    return app


def test_while_draining_requests_in_flight_finish_and_new_ones_are_rejected() -> None:
    async def scenario() -> None:
        state, finish = DrainState(), asyncio.Event()
        transport = httpx.ASGITransport(app=app_with(state, finish))
        async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as http:
            in_flight = asyncio.ensure_future(http.get("/"))
            while not state.in_flight:
                await asyncio.sleep(0)
            state.start()
            rejected = await http.get("/")
            assert rejected.status_code == 503
            assert rejected.json()["error"]["code"] == "service_stopping"
            assert int(rejected.headers["retry-after"]) > 0
            assert state.in_flight == 1
            finish.set()
            assert (await in_flight).text == "first last"
            assert state.in_flight == 0

    asyncio.run(scenario())


def test_draining_ends_when_it_is_stopped_or_after_its_time() -> None:
    async def scenario() -> None:
        state, finish = DrainState(), asyncio.Event()
        finish.set()
        transport = httpx.ASGITransport(app=app_with(state, finish))
        async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as http:
            state.start(0.2)
            assert (await http.get("/")).status_code == 503
            while state.draining:
                await asyncio.sleep(0.01)
            assert (await http.get("/")).status_code == 200
            state.start()
            assert (await http.get("/")).status_code == 503
            state.stop()
            assert (await http.get("/")).status_code == 200

    asyncio.run(scenario())
