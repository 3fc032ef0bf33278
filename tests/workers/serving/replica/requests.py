"""Requests to a replica, and what its answers contain."""

import asyncio
from typing import Any

from workers.serving.generation import (
    AnswerItem,
    Finished,
    Generation,
    Prompt,
    RequestRejected,
    Sampling,
    Started,
    Token,
)
from workers.serving.replica.replica import Replica

PROMPT = "The cat sat on"


def generation(
    prompts: tuple[Prompt, ...] = (PROMPT,),
    *,
    n: int = 1,
    stream: bool = False,
    version: int | None = None,
    affinity: str | None = None,
    **sampling: Any,
) -> Generation:
    """Return a greedy request for ten tokens, with the arguments applied to it."""
    changed = Sampling(**{"max_tokens": 10, "temperature": 0.0, **sampling})
    return Generation("line", prompts, changed, n=n, stream=stream, version=version, affinity=affinity)


async def collect(replica: Replica, request: Generation) -> list[AnswerItem]:
    return [item async for batch in replica.generate(request) for item in batch]


def ask(replica: Replica, request: Generation) -> list[AnswerItem]:
    return asyncio.run(collect(replica, request))


def number(answer: list[AnswerItem]) -> int:
    """Return the number of the version that answered."""
    assert isinstance(answer[0], Started), answer[0]
    return answer[0].number


def rejection(answer: list[AnswerItem]) -> RequestRejected:
    assert isinstance(answer[-1], RequestRejected), answer[-1]
    return answer[-1]


def text(answer: list[AnswerItem]) -> str:
    return "".join(item.text for item in answer if isinstance(item, Token | Finished))
