"""The queue that carries an engine's output to the event loop."""

import asyncio
from typing import Any

import pytest

from workers.serving.engine.port import EngineEvent, SequenceFailed
from workers.serving.generation import Finished, FinishReason, Token
from workers.serving.replica.output_queue import OutputQueue


def token(index: int) -> Token:
    return Token(index, "a", "a", b"a", 0, None, None)


def finished(index: int) -> Finished:
    return Finished(index, FinishReason.LENGTH, "", 1)


async def soon(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, 10)


@pytest.mark.parametrize("whole", [True, False])
def test_one_choice_may_fail_in_the_step_that_finishes_the_other(whole: bool) -> None:
    async def scenario() -> None:
        output = OutputQueue(2, whole=whole)
        events: list[EngineEvent] = [SequenceFailed(0, "not finite"), token(1), finished(1)]
        output.put(events)
        assert await soon(output.get(0.0)) == events

    asyncio.run(scenario())


def test_a_stream_is_read_in_batches_that_are_never_early_and_never_empty() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        output = OutputQueue(1, whole=False)
        for _ in range(3):  # reading from an empty queue, then from a filled one
            reading = asyncio.create_task(output.get(0.0))
            await asyncio.sleep(0.01)
            assert not reading.done()
            output.put([token(0)])
            assert await soon(reading) == [token(0)]
            output.put([token(0)])
            output.put([token(0)])
            not_before = loop.time() + 0.1
            assert await soon(output.get(not_before)) == [token(0), token(0)]
            assert loop.time() >= not_before
        output.put([token(0)])
        reading = asyncio.create_task(output.get(loop.time() + 1000.0))
        await asyncio.sleep(0.01)
        assert not reading.done()
        output.put([finished(0)])
        assert await soon(reading) == [token(0), finished(0)], "the last batch is not delayed"

    asyncio.run(scenario())


def test_a_whole_answer_is_read_at_once() -> None:
    async def scenario() -> None:
        output = OutputQueue(2, whole=True)
        reading = asyncio.create_task(output.get(0.0))
        for index in (0, 1):
            await asyncio.sleep(0.01)
            assert not reading.done()
            output.put([token(index), finished(index)])
        assert await soon(reading) == [token(0), finished(0), token(1), finished(1)]
        assert output.first_token.count == 1

    asyncio.run(scenario())


def test_a_failure_wakes_the_reader() -> None:
    async def scenario() -> None:
        output = OutputQueue(1, whole=True)
        reading = asyncio.create_task(output.get(0.0))
        await asyncio.sleep(0.01)
        output.fail("the engine has died")
        assert await soon(reading) == [SequenceFailed(0, "the engine has died")]

    asyncio.run(scenario())
