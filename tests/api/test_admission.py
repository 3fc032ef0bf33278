"""Turns of uploads: so many at once, some wait, the rest are refused."""

import asyncio

import pytest

from api.admission import Admission
from service.core.errors import Unavailable


def test_those_who_wait_come_in_order_and_no_more_than_so_many_at_once() -> None:
    async def run() -> list[int]:
        admission = Admission(2, 10, 10.0)
        came: list[int] = []
        inside = 0

        async def one(number: int) -> None:
            nonlocal inside
            async with admission.turn():
                inside += 1
                assert inside <= 2
                came.append(number)
                await asyncio.sleep(0.001)
                inside -= 1

        await asyncio.gather(*(one(number) for number in range(8)))
        return came

    assert asyncio.run(run()) == list(range(8))


def test_whoever_comes_when_too_many_wait_is_refused() -> None:
    async def run() -> None:
        admission = Admission(1, 1, 10.0)

        async def wait() -> None:
            async with admission.turn():
                pass

        async with admission.turn():
            waiting = asyncio.create_task(wait())
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="wait for their turn"):
                await wait()
        await waiting

    asyncio.run(run())


def test_whoever_waits_too_long_is_refused_and_leaves_no_turn_taken() -> None:
    async def run() -> None:
        admission = Admission(1, 1, 0.01)
        async with admission.turn():
            with pytest.raises(Unavailable, match="took longer"):
                async with admission.turn():
                    pass
        async with admission.turn():
            pass

    asyncio.run(run())
