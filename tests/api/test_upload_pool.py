"""Upload slots: a few uploads at once, some more wait in order, and the rest are refused."""

import asyncio
from collections.abc import Iterator

import pytest

from api.upload_pool import UploadPool
from service.core.errors import Unavailable


@pytest.fixture
def pools() -> Iterator[list[UploadPool]]:
    """Pools to close at the end of the test."""
    pools: list[UploadPool] = []
    yield pools
    for pool in pools:
        pool.close()


def test_uploads_wait_in_order_and_only_two_hold_a_slot(pools: list[UploadPool]) -> None:
    async def run() -> list[int]:
        pool = UploadPool("test", slots=2, threads=1)
        pools.append(pool)
        order: list[int] = []
        num_inside = 0

        async def upload(number: int) -> None:
            nonlocal num_inside
            async with pool.slot():
                num_inside += 1
                assert num_inside <= 2
                order.append(number)
                await asyncio.sleep(0.001)
                num_inside -= 1

        await asyncio.gather(*(upload(number) for number in range(8)))
        return order

    assert asyncio.run(run()) == list(range(8))


def test_an_upload_is_refused_if_too_many_wait(pools: list[UploadPool]) -> None:
    async def run() -> None:
        pool = UploadPool("test", slots=1, threads=1, max_waiting=1)
        pools.append(pool)

        async def upload() -> None:
            async with pool.slot():
                pass

        async with pool.slot():
            waiting = asyncio.create_task(upload())
            await asyncio.sleep(0)
            with pytest.raises(Unavailable, match="are waiting"):
                await upload()
        await waiting

    asyncio.run(run())


def test_an_upload_that_waits_too_long_is_refused_and_holds_no_slot(pools: list[UploadPool]) -> None:
    async def run() -> None:
        pool = UploadPool("test", slots=1, threads=1, max_waiting=1, max_wait_seconds=0.01)
        pools.append(pool)
        async with pool.slot():
            with pytest.raises(Unavailable, match="became free"):
                async with pool.slot():
                    pass
        async with pool.slot():
            pass

    asyncio.run(run())
