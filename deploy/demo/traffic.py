"""Load generator for a served model, which counts the answers of each version. Updates must not disturb it.

It sends OpenAI-style requests over plain HTTP, alternately streamed and not. Every answer must name one
version, in its header and in each chunk. Requests are never retried, so that every failure is counted.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

VERSION_HEADER = "x-pathswitch-version"
PROMPTS = ("Return the", "The function", "If the argument is", "Parameters\n", "Raises ")
MAX_TOKENS = 16
# Pause of each thread between requests. Training shares the processors, so the load must be moderate.
PAUSE_SECONDS = 0.6
TIMEOUT_SECONDS = 30.0
FAILURES_KEPT = 20


class AnswerError(Exception):
    """The answer to a request is an error, or broken."""


class MixedAnswer(AnswerError):
    """An answer names several versions, or none."""


@dataclass
class Tally:
    """Counts of requests by outcome. `latencies` are the seconds until the end of each answer."""

    answered: Counter[int] = field(default_factory=Counter)
    streamed: int = 0
    failed: int = 0
    mixed: int = 0
    failures: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.answered.total() + self.failed + self.mixed

    def latency(self, quantile: float) -> float | None:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(quantile * len(ordered)))] if ordered else None


class LoadGenerator:
    """Sends requests from `start` to `stop`. `url` is the base of the OpenAI API, including /v1."""

    def __init__(self, url: str, model: str, *, num_threads: int = 3) -> None:
        self._url = url
        self._model = model
        self._tally = Tally()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"traffic-{number}", daemon=True)
            for number in range(num_threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> Tally:
        """Wait for the requests in flight, and return the counts."""
        self._stopping.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        return self._tally

    @property
    def requests(self) -> int:
        """Number of finished requests so far."""
        with self._lock:
            return self._tally.requests

    def _run(self, number: int) -> None:
        with httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False) as client:
            count = number
            while not self._stopping.is_set():
                self._send_one(client, PROMPTS[count % len(PROMPTS)], stream=count % 2 == 0)
                count += 1
                self._stopping.wait(PAUSE_SECONDS)

    def _send_one(self, client: httpx.Client, prompt: str, *, stream: bool) -> None:
        start = time.monotonic()
        try:
            version, _ = complete(client, self._url, self._model, prompt, stream=stream)
        except (httpx.HTTPError, AnswerError) as error:
            with self._lock:
                if isinstance(error, MixedAnswer):
                    self._tally.mixed += 1
                else:
                    self._tally.failed += 1
                if len(self._tally.failures) < FAILURES_KEPT:
                    self._tally.failures.append(f"{type(error).__name__}: {error}")
            return
        with self._lock:
            self._tally.answered[version] += 1
            self._tally.streamed += stream
            self._tally.latencies.append(time.monotonic() - start)


def complete(
    client: httpx.Client,
    url: str,
    model: str,
    prompt: str,
    *,
    stream: bool = False,
    max_tokens: int = MAX_TOKENS,
    seed: int | None = None,
) -> tuple[int, str]:
    """Request one completion.

    Returns the version that made it, and its text. Raises AnswerError or httpx.HTTPError.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "seed": seed,
        "stream": stream,
    }
    with client.stream("POST", f"{url}/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise AnswerError(f"{response.status_code}: {response.read().decode(errors='replace')[:300]}")
        chunks = list(_events(response.iter_lines())) if stream else [json.loads(response.read())]
    version = version_of(model, response.headers.get(VERSION_HEADER), chunks)
    return version, "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def version_of(model: str, header: str | None, chunks: Iterable[dict[str, Any]]) -> int:
    """The version that the header and all chunks of an answer name. Raises MixedAnswer."""
    named = {chunk.get("system_fingerprint") for chunk in chunks}
    if header is None or not header.isdigit() or named != {f"{model}@{header}"}:
        raise MixedAnswer(f"the header names version {header}, the fingerprints {sorted(map(str, named))}")
    return int(header)


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The chunks of a stream. Raises AnswerError if it breaks off or contains an error."""
    for line in lines:
        if not line.startswith("data: "):
            continue
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise AnswerError(f"error in a stream: {chunk['error']}")
        yield chunk
    raise AnswerError("a stream ended before [DONE]")
