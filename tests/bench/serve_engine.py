"""The bare engine against transformers' ``generate``: same prompts, same threads, a process each, in turns."""

import multiprocessing
import queue
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.bench.figure import Figure
from tests.bench.serve_model import VOCABULARY
from workers.data.tokenizer import load_tokenizer
from workers.pretrained import load_model
from workers.serving.engine.detokenizer import Vocabulary
from workers.serving.engine.port import EngineEvent, SequenceFailed, SequenceRequest
from workers.serving.engine.transformers_engine import TransformersEngine
from workers.serving.generation import Finished, Sampling, Token

SLOTS = 16
PROMPT_TOKENS = 32
EQUAL_TOKENS = 128
SHORTEST, LONGEST = 8, 256
MIXED_REQUESTS = 128
SEQUENTIAL_REQUESTS = 3  # of the 16: one takes as long as another
ROUNDS = 3
FIRST_TOKENS = 200  # requests whose first token is waited for


@dataclass(frozen=True)
class Work:
    """Prompts to continue greedily, each by so many tokens. ``together``: how many at once."""

    prompts: list[list[int]]
    lengths: list[int]
    together: int


@dataclass(frozen=True)
class Done:
    """Tokens of every sequence, how long it all took, and when each sequence's first token came after it was asked for."""

    tokens: list[list[bytes]]
    seconds: float
    first_seconds: list[float]

    @property
    def rate(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


def engine_figures(folder: Path, threads: int) -> list[Figure]:
    rng = random.Random(0)
    equal = Work(_prompts(rng, SLOTS), [EQUAL_TOKENS] * SLOTS, SLOTS)
    sequential = Work(equal.prompts[:SEQUENTIAL_REQUESTS], equal.lengths[:SEQUENTIAL_REQUESTS], 1)
    lengths = [
        SHORTEST + (LONGEST - SHORTEST) * number // (MIXED_REQUESTS - 1) for number in range(MIXED_REQUESTS)
    ]
    rng.shuffle(lengths)
    mixed = Work(_prompts(rng, MIXED_REQUESTS), lengths, SLOTS)
    unloaded = Work(_prompts(rng, FIRST_TOKENS // 4), [4] * (FIRST_TOKENS // 4), 1)
    loaded = Work(_prompts(rng, FIRST_TOKENS), [64] * FIRST_TOKENS, SLOTS)
    with _process(_generate, folder, threads) as peer, _process(_decode, folder, threads) as engine:
        one, batch, ours = _rates((peer, sequential), (peer, equal), (engine, equal))
        batch_mixed, ours_mixed = _rates((peer, mixed), (engine, mixed))
        same = sum(
            ours_ == theirs
            for work in (equal, mixed)
            for ours_, theirs in zip(engine(work).tokens, peer(work).tokens, strict=True)
        )
        alone, busy = engine(unloaded).first_seconds, engine(loaded).first_seconds
    name = f"engine, {threads} threads" if threads > 1 else "engine, 1 thread"
    return [
        Figure(name, "tokens/s, generate one by one", one),
        Figure(name, "tokens/s, generate 16 as a batch", batch),
        Figure(name, "tokens/s, engine, 16 at once", ours),
        Figure(name, "times one by one", ours / one, 8.0, at_least=True),
        Figure(name, "times the batch, equal lengths", ours / batch, 1.4, at_least=True),
        Figure(name, "tokens/s, batch, 8 to 256 tokens", batch_mixed),
        Figure(name, "tokens/s, engine, 8 to 256 tokens", ours_mixed),
        Figure(name, "times the batch, mixed lengths", ours_mixed / batch_mixed, 2.5, at_least=True),
        Figure(
            name,
            "sequences equal to generate's, %",
            100 * same / (SLOTS + MIXED_REQUESTS),
            100,
            at_least=True,
        ),
        Figure(name, "first token alone, p50 ms", 1e3 * statistics.median(alone)),
        Figure(name, "first token among 16, p50 ms", 1e3 * statistics.median(busy)),
        Figure(name, "first token among 16, p99 ms", 1e3 * _p99(busy)),
        Figure(name, "times p99 alone", _p99(busy) / _p99(alone), 3.0),
    ]


def _prompts(rng: random.Random, number: int) -> list[list[int]]:
    return [[rng.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(number)]


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def _rates(*pairs: tuple[Callable[[Work], Done], Work]) -> list[float]:
    """Tokens a second of each, the median of the rounds: in every round one after another, before them once to warm up."""
    rates: list[list[float]] = [[] for _ in pairs]
    for round_ in range(ROUNDS + 1):
        for (process, work), seen in zip(pairs, rates, strict=True):
            rate = process(work).rate
            if round_:
                seen.append(rate)
    return [statistics.median(seen) for seen in rates]


@contextmanager
def _process(
    target: Callable[[Path, int, Connection], None], folder: Path, threads: int
) -> Iterator[Callable[[Work], Done]]:
    """Someone who does the work that is sent to them, alone in a process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(folder, threads, there), daemon=True)
    process.start()
    there.close()

    def do(work: Work) -> Done:
        here.send(work)
        done: Done = here.recv()
        return done

    try:
        yield do
    finally:
        here.close()
        process.join(30)
        process.kill()


def _works(connection: Connection) -> Iterator[Work]:
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return


@torch.inference_mode()
def _generate(folder: Path, threads: int, connection: Connection) -> None:
    torch.set_num_threads(threads)
    model: Any = load_model(folder, dtype=torch.float32).eval()
    raw = Vocabulary(load_tokenizer(folder).backend_tokenizer, "ByteLevel").raw
    for work in _works(connection):
        began = time.perf_counter()
        tokens: list[list[bytes]] = []
        for first in range(0, len(work.prompts), work.together):
            prompts_BT = torch.tensor(work.prompts[first : first + work.together])
            lengths = work.lengths[first : first + work.together]
            output_BT = model.generate(
                prompts_BT,
                attention_mask=torch.ones_like(prompts_BT),
                max_new_tokens=max(lengths),
                do_sample=False,
                pad_token_id=0,
            )
            new = output_BT[:, prompts_BT.shape[1] :].tolist()
            tokens += [[raw(id) for id in ids[:length]] for ids, length in zip(new, lengths, strict=True)]
        connection.send(Done(tokens, time.perf_counter() - began, []))


def _decode(folder: Path, threads: int, connection: Connection) -> None:
    engine = TransformersEngine(folder, threads)
    for work in _works(connection):
        connection.send(_by_clients(engine, work))


def _by_clients(engine: TransformersEngine, work: Work) -> Done:
    """So many clients, each of which asks again as soon as it is answered."""
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    tokens: list[list[bytes]] = [[] for _ in work.prompts]
    asked: list[float] = []
    first: dict[int, float] = {}

    def ask() -> None:
        index = len(asked)
        asked.append(time.perf_counter())
        sampling = Sampling(max_tokens=work.lengths[index], temperature=0.0)
        prompt = tuple(work.prompts[index])
        engine.submit([SequenceRequest(index, prompt, work.lengths[index], 0, sampling)], emitted.put)

    began = time.perf_counter()
    for _ in range(work.together):
        ask()
    finished = 0
    while finished < len(work.prompts):
        for event in emitted.get(timeout=120):
            if isinstance(event, SequenceFailed):
                raise RuntimeError(event.message)
            if isinstance(event, Token):
                first.setdefault(event.index, time.perf_counter() - asked[event.index])
                tokens[event.index].append(event.raw)
            if isinstance(event, Finished):
                finished += 1
                if len(asked) < len(work.prompts):
                    ask()
    seconds = time.perf_counter() - began
    return Done(tokens, seconds, [first[index] for index in range(len(tokens))])
