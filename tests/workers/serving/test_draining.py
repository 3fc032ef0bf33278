"""The ingress before everything ends: what is inside is answered, newcomers are told to come back."""

import asyncio
from collections.abc import AsyncIterator

import httpx
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from workers.serving.draining import Door, Doorkeeper


def app_behind(door: Door, go_on: asyncio.Event) -> FastAPI:
    app = FastAPI()
    app.add_middleware(Doorkeeper, door=door)

    async def words() -> AsyncIterator[str]:
        yield "first "
        await go_on.wait()
        yield "last"

    @app.get("/")
    async def stream() -> StreamingResponse:
        return StreamingResponse(words())

    return app


def test_what_is_inside_ends_and_what_comes_is_told_to_come_back() -> None:
    async def scenario() -> None:
        door, go_on = Door(), asyncio.Event()
        transport = httpx.ASGITransport(app=app_behind(door, go_on))
        async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as http:
            inside = asyncio.ensure_future(http.get("/"))
            while not door.inside:
                await asyncio.sleep(0)
            door.shut()
            refused = await http.get("/")
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "service_stopping"
            assert int(refused.headers["retry-after"]) > 0
            assert door.inside == 1
            go_on.set()
            assert (await inside).text == "first last"
            assert door.inside == 0

    asyncio.run(scenario())


def test_a_door_opens_when_it_is_opened_or_by_itself() -> None:
    async def scenario() -> None:
        door, go_on = Door(), asyncio.Event()
        go_on.set()
        transport = httpx.ASGITransport(app=app_behind(door, go_on))
        async with httpx.AsyncClient(transport=transport, base_url="http://ingress") as http:
            door.shut(0.2)
            assert (await http.get("/")).status_code == 503
            while door.is_shut:
                await asyncio.sleep(0.01)
            assert (await http.get("/")).status_code == 200
            door.shut()
            assert (await http.get("/")).status_code == 503
            door.open()
            assert (await http.get("/")).status_code == 200

    asyncio.run(scenario())
