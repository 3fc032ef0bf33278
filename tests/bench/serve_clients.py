"""Clients of the OpenAI interface on one event loop, and the outcome of each of their requests."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from tests.bench.serve_world import MODEL

TIMEOUT_SECONDS = 120.0


@dataclass
class Answer:
    """The outcome of one request. ``status`` 0: the connection broke. ``whole``: complete, and from a single version."""

    sent_at: float
    status: int = 0
    error: str = ""
    retry_after: float | None = None
    version: str = ""
    text: str = ""
    num_tokens: int = 0
    first_seconds: float | None = None
    seconds: float = 0.0
    whole: bool = False
    attempts: int = 1

    @property
    def ended_at(self) -> float:
        return self.sent_at + self.seconds


@dataclass(frozen=True)
class Ask:
    """A request. With ``retry_seconds`` the client retries once, after that time or after Retry-After."""

    prompt: Sequence[int]
    max_tokens: int
    stream: bool = False
    version: int | None = None
    retry_seconds: float | None = None


@dataclass
class Clients:
    """Clients that repeat their requests until they are stopped.

    A client repeats the same prompt, which the engine then caches, unless ``new_prompt`` gives it another one each time.
    """

    url: str
    new_prompt: Callable[[], Sequence[int]] | None = None
    answers: list[Answer] = field(default_factory=list)
    stopped: bool = False

    async def run(self, asks: Sequence[Ask], *, heed_retry_after: bool = False) -> None:
        """Run one client per request. With ``heed_retry_after`` clients wait as long as Retry-After says."""
        async with _session(self.url) as http:
            await asyncio.gather(*(self._client(http, ask, heed_retry_after) for ask in asks))

    async def _client(self, http: aiohttp.ClientSession, ask: Ask, heed_retry_after: bool) -> None:
        while not self.stopped:
            if self.new_prompt is not None:
                ask = replace(ask, prompt=self.new_prompt())
            answer = await ask_once(http, ask)
            if not answer.whole and ask.retry_seconds is not None and answer.status != 429:
                await asyncio.sleep(answer.retry_after or ask.retry_seconds)
                again = await ask_once(http, ask)
                again.attempts, again.seconds = 2, again.ended_at - answer.sent_at
                again.sent_at = answer.sent_at
                answer = again
            self.answers.append(answer)
            if heed_retry_after and answer.retry_after:
                await asyncio.sleep(answer.retry_after)


async def ask_all(url: str, asks: Sequence[Ask], concurrency: int) -> list[Answer]:
    """Send every request once, in order, ``concurrency`` at a time."""
    answers: dict[int, Answer] = {}
    pending = iter(enumerate(asks))

    async with _session(url) as http:

        async def client() -> None:
            for position, ask in pending:
                answers[position] = await ask_once(http, ask)

        await asyncio.gather(*(client() for _ in range(concurrency)))
    return [answers[position] for position in range(len(asks))]


async def run_during(clients: Clients, asks: Sequence[Ask], work: Callable[[], Any], **options: bool) -> Any:
    """Run the clients while ``work`` runs in a thread. Returns the result of ``work``."""
    running: Awaitable[None] = asyncio.ensure_future(clients.run(asks, **options))
    try:
        return await asyncio.to_thread(work)
    finally:
        clients.stopped = True
        await running


async def ask_once(http: aiohttp.ClientSession, ask: Ask) -> Answer:
    name = MODEL if ask.version is None else f"{MODEL}@{ask.version}"
    body = {
        "model": name,
        "prompt": list(ask.prompt),
        "max_tokens": ask.max_tokens,
        "temperature": 0,
        "stream": ask.stream,
        **({"stream_options": {"include_usage": True}} if ask.stream else {}),
    }
    answer = Answer(time.perf_counter())
    try:
        async with http.post("/v1/completions", json=body) as response:
            answer.status = response.status
            answer.version = response.headers.get("x-pathswitch-version", "")
            if "retry-after" in response.headers:
                answer.retry_after = float(response.headers["retry-after"])
            if response.status != 200:
                answer.error = await response.text()
            elif ask.stream:
                await _read_stream(response, answer)
            else:
                _read_whole(await response.json(), answer)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.seconds = time.perf_counter() - answer.sent_at
    answer.whole = answer.whole and answer.num_tokens == ask.max_tokens
    return answer


def _read_whole(document: dict[str, Any], answer: Answer) -> None:
    [choice] = document["choices"]
    answer.text = choice["text"]
    answer.num_tokens = document["usage"]["completion_tokens"]
    answer.whole = document["system_fingerprint"] == f"{MODEL}@{answer.version}"


async def _read_stream(response: aiohttp.ClientResponse, answer: Answer) -> None:
    fingerprints: set[str] = set()
    async for line in response.content:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            answer.whole = fingerprints == {f"{MODEL}@{answer.version}"}
            return
        if answer.first_seconds is None:
            answer.first_seconds = time.perf_counter() - answer.sent_at
        chunk = json.loads(line[6:])
        if "error" in chunk:
            answer.error = str(chunk["error"])
            return
        fingerprints.add(chunk["system_fingerprint"])
        answer.text += "".join(choice["text"] for choice in chunk["choices"])
        if chunk.get("usage"):
            answer.num_tokens = chunk["usage"]["completion_tokens"]


def _session(url: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
    )
