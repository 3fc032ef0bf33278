"""What passes an engine's words to the event loop."""

import asyncio
from typing import Any

import pytest

from workers.serving.engine.port import SequenceFailed
from workers.serving.generation import Finished, FinishReason, Token
from workers.serving.outbox import Outbox


def token(index: int) -> Token:
    return Token(index, "a", "a", b"a", 0, None, None)


def finished(index: int) -> Finished:
    return Finished(index, FinishReason.LENGTH, "", 1)


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, 10)


@pytest.mark.parametrize("whole", [True, False])
def test_of_two_choices_one_may_fail_in_the_turn_that_ends_the_other(whole: bool) -> None:
    async def fetch() -> None:
        outbox = Outbox(2, whole=whole)
        events = [SequenceFailed(0, "not finite"), token(1), finished(1)]
        outbox.put(events)
        assert await soon(outbox.fetch(0.0)) == events

    asyncio.run(fetch())


def test_a_stream_comes_in_batches_no_sooner_than_asked_and_never_empty() -> None:
    async def fetch() -> None:
        loop = asyncio.get_running_loop()
        outbox = Outbox(1, whole=False)
        for _ in range(3):  # with something there already, and with nothing
            fetching = asyncio.create_task(outbox.fetch(0.0))
            await asyncio.sleep(0.01)
            assert not fetching.done()
            outbox.put([token(0)])
            assert await soon(fetching) == [token(0)]
            outbox.put([token(0)])
            outbox.put([token(0)])
            not_before = loop.time() + 0.1
            assert await soon(outbox.fetch(not_before)) == [token(0), token(0)]
            assert loop.time() >= not_before
        outbox.put([token(0)])
        fetching = asyncio.create_task(outbox.fetch(loop.time() + 1000.0))
        await asyncio.sleep(0.01)
        assert not fetching.done()
        outbox.put([finished(0)])
        assert await soon(fetching) == [token(0), finished(0)], "at the end at once"

    asyncio.run(fetch())


def test_a_whole_answer_comes_once_with_all_of_it() -> None:
    async def fetch() -> None:
        outbox = Outbox(2, whole=True)
        fetching = asyncio.create_task(outbox.fetch(0.0))
        for index in (0, 1):
            await asyncio.sleep(0.01)
            assert not fetching.done()
            outbox.put([token(index), finished(index)])
        assert await soon(fetching) == [token(0), finished(0), token(1), finished(1)]
        assert outbox.first_token.count == 1

    asyncio.run(fetch())


def test_given_up_it_ends_for_whoever_waits() -> None:
    async def fetch() -> None:
        outbox = Outbox(1, whole=True)
        fetching = asyncio.create_task(outbox.fetch(0.0))
        await asyncio.sleep(0.01)
        outbox.fail("the engine has died")
        assert await soon(fetching) == [SequenceFailed(0, "the engine has died")]

    asyncio.run(fetch())
