"""Compares the bare engine with transformers' ``generate``, in turns, each in its own process."""

import multiprocessing
import os
import queue
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from tests.bench.figure import Figure
from tests.bench.serve_model import VOCABULARY
from workers.data.tokenizer import load_tokenizer
from workers.serving.engine.batching.transformers_engine import TransformersEngine
from workers.serving.engine.memory import this_device
from workers.serving.engine.port import EngineEvent, SequenceFailed, SequenceRequest
from workers.serving.engine.text.detokenizer import Vocabulary
from workers.serving.generation import Finished, Sampling, Token
from workers.training.pretrained import load_model

SLOTS = 16
PROMPT_TOKENS = 32
EQUAL_TOKENS = 128
SHORTEST, LONGEST = 8, 256
MIXED_REQUESTS = 128
SEQUENTIAL_REQUESTS = 3  # of the 16, which all take equally long
ROUNDS = 9  # with equal lengths; each takes two seconds, and the machine's speed varies
MIXED_ROUNDS = 5
ALONE_REQUESTS = 100  # whose first token is timed on an idle engine
TIED = 1e-4  # logits closer than this may swap when float32 sums run in another order


@dataclass(frozen=True)
class Work:
    """Prompts to continue greedily, each by its length; ``together`` of them run at once."""

    prompts: list[list[int]]
    lengths: list[int]
    together: int


@dataclass(frozen=True)
class Done:
    """The tokens of every sequence, the total time, and each sequence's time to the first token.

    ``busy_rate``: tokens per second until the last sequence was submitted, while all slots were in use.
    """

    tokens: list[list[int]]
    seconds: float
    first_seconds: list[float]
    busy_rate: float = 0.0

    @property
    def rate(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


def engine_figures(folder: Path, threads: int, name: str) -> list[Figure]:
    """Measure everything. ``threads`` 0 keeps torch's default. Speed targets are for all cores of a CPU."""
    figures = _engine_figures(folder, threads, name)
    if this_device().type == "cuda":
        return [replace(figure, target=None) for figure in figures]
    if threads in (0, os.cpu_count()):
        return figures
    return [replace(figure, target=None) if figure.at_least else figure for figure in figures]


def _engine_figures(folder: Path, threads: int, name: str) -> list[Figure]:
    rng = random.Random(0)
    equal = Work(random_prompts(rng, SLOTS), [EQUAL_TOKENS] * SLOTS, SLOTS)
    sequential = Work(equal.prompts[:SEQUENTIAL_REQUESTS], equal.lengths[:SEQUENTIAL_REQUESTS], 1)
    lengths = [
        SHORTEST + (LONGEST - SHORTEST) * number // (MIXED_REQUESTS - 1) for number in range(MIXED_REQUESTS)
    ]
    rng.shuffle(lengths)
    mixed = Work(random_prompts(rng, MIXED_REQUESTS), lengths, SLOTS)
    alone = Work(random_prompts(rng, ALONE_REQUESTS), [4] * ALONE_REQUESTS, 1)
    with _process(_generate, folder, threads) as peer, _process(_decode, folder, threads) as engine:
        for process in (peer, engine):
            process(replace(equal, lengths=[SHORTEST] * SLOTS))
        one, batch, ours = _in_turns(ROUNDS, (peer, sequential), (peer, equal), (engine, equal))
        batch_mixed, ours_mixed, ours_alone = _in_turns(
            MIXED_ROUNDS, (peer, mixed), (engine, mixed), (engine, alone)
        )
    differing = _differences(equal, ours[0], batch[0]) + _differences(mixed, ours_mixed[0], batch_mixed[0])
    gaps = _gaps(folder, differing)
    # The first 16 arrive together and wait for each other's prompts; the others arrive under load.
    loaded = [seconds for done in ours_mixed for seconds in done.first_seconds[SLOTS:]]
    unloaded = [seconds for done in ours_alone for seconds in done.first_seconds]
    return [
        Figure(name, "tokens/s, generate one by one", _rate(one)),
        Figure(name, "tokens/s, generate 16 as a batch", _rate(batch)),
        Figure(name, "tokens/s, engine, 16 at once", _rate(ours)),
        Figure(name, "times one by one", _times(ours, one), 6.0, at_least=True),
        Figure(name, "times the batch, equal lengths", _times(ours, batch), 1.2, at_least=True),
        Figure(name, "tokens/s, batch, 8 to 256 tokens", _rate(batch_mixed)),
        Figure(name, "tokens/s, engine, 8 to 256 tokens", _rate(ours_mixed)),
        Figure(name, "times the batch, mixed lengths", _times(ours_mixed, batch_mixed), 2.0, at_least=True),
        Figure(
            name,
            "the same, while 16 are in flight",
            statistics.median(
                own.busy_rate / other.rate for own, other in zip(ours_mixed, batch_mixed, strict=True)
            ),
        ),
        Figure(name, f"answers of {SLOTS + MIXED_REQUESTS} that differ from generate's", len(differing)),
        Figure(name, "largest logit gap of those in float64", max(gaps, default=0.0), TIED),
        Figure(name, "first token alone, p50 ms", 1e3 * statistics.median(unloaded)),
        Figure(name, "first token among 16, p50 ms", 1e3 * statistics.median(loaded)),
        Figure(name, "first token among 16, p99 ms", 1e3 * p99(loaded)),
        Figure(name, "times p99 alone", p99(loaded) / p99(unloaded), 3.0),
    ]


def random_prompts(rng: random.Random, number: int) -> list[list[int]]:
    return [[rng.randrange(VOCABULARY) for _ in range(PROMPT_TOKENS)] for _ in range(number)]


def p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def _in_turns(rounds: int, *pairs: tuple[Callable[[Work], Done], Work]) -> list[list[Done]]:
    """Run all pairs one after another in every round. Returns each pair's results."""
    done: list[list[Done]] = [[] for _ in pairs]
    for _ in range(rounds):
        for (process, work), own in zip(pairs, done, strict=True):
            own.append(process(work))
    return done


def _rate(rounds: Sequence[Done]) -> float:
    return statistics.median(done.rate for done in rounds)


def _times(ours: Sequence[Done], theirs: Sequence[Done]) -> float:
    """The median of the rounds' speed ratios."""
    return statistics.median(own.rate / other.rate for own, other in zip(ours, theirs, strict=True))


def _differences(work: Work, ours: Done, theirs: Done) -> list[tuple[list[int], int, int]]:
    """For every sequence that differs: the common tokens, our next token and theirs."""
    differences = []
    for prompt, own, other in zip(work.prompts, ours.tokens, theirs.tokens, strict=True):
        at = next((at for at, pair in enumerate(zip(own, other, strict=True)) if pair[0] != pair[1]), None)
        if at is not None:
            differences.append((prompt + own[:at], own[at], other[at]))
    return differences


@torch.inference_mode()
def _gaps(folder: Path, differences: Sequence[tuple[list[int], int, int]]) -> list[float]:
    """Difference of the two tokens' logits in float64."""
    model: Any = load_model(folder, dtype=torch.float64).eval()
    gaps = []
    for common, own, other in differences:
        logits_V = model(torch.tensor([common])).logits[0, -1]
        gaps.append(abs(float(logits_V[own] - logits_V[other])))
    return gaps


def bare_engine(folder: Path, threads: int) -> AbstractContextManager[Callable[[Work], Done]]:
    """The engine in a process of its own, without HTTP."""
    return _process(_decode, folder, threads)


@contextmanager
def _process(
    target: Callable[[Path, int, Connection], None], folder: Path, threads: int
) -> Iterator[Callable[[Work], Done]]:
    """A process that runs ``target``. Yields a function that sends it work and returns the result."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(folder, threads, theirs), daemon=True)
    process.start()
    theirs.close()

    def do(work: Work) -> Done:
        ours.send(work)
        done: Done = ours.recv()
        return done

    try:
        yield do
    finally:
        ours.close()
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
    if threads:
        torch.set_num_threads(threads)
    device = this_device()
    model: Any = load_model(folder, dtype="auto" if device.type == "cuda" else torch.float32)
    model.to(device).eval()
    for work in _works(connection):
        began = time.perf_counter()
        tokens: list[list[int]] = []
        for first in range(0, len(work.prompts), work.together):
            prompts_BT = torch.tensor(work.prompts[first : first + work.together], device=device)
            lengths = work.lengths[first : first + work.together]
            output_BT = model.generate(
                prompts_BT,
                attention_mask=torch.ones_like(prompts_BT),
                max_new_tokens=max(lengths),
                do_sample=False,
                pad_token_id=0,
            )
            new = output_BT[:, prompts_BT.shape[1] :].tolist()
            tokens += [ids[:length] for ids, length in zip(new, lengths, strict=True)]
        connection.send(Done(tokens, time.perf_counter() - began, []))


def _decode(folder: Path, threads: int, connection: Connection) -> None:
    engine = TransformersEngine(folder, threads)
    raw = Vocabulary(load_tokenizer(folder).backend_tokenizer, "ByteLevel").raw
    ids = {raw(id): id for id in range(VOCABULARY)}
    for work in _works(connection):
        connection.send(_by_clients(engine, ids, work))


def _by_clients(engine: TransformersEngine, ids: Mapping[bytes, int], work: Work) -> Done:
    """Run ``work.together`` clients, each of which submits its next prompt as soon as it is answered."""
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    tokens: list[list[int]] = [[] for _ in work.prompts]
    submitted: list[float] = []
    first: dict[int, float] = {}

    def submit() -> None:
        index = len(submitted)
        submitted.append(time.perf_counter())
        sampling = Sampling(max_tokens=work.lengths[index], temperature=0.0)
        prompt = tuple(work.prompts[index])
        engine.submit([SequenceRequest(index, prompt, work.lengths[index], 0, sampling)], emitted.put)

    began = time.perf_counter()
    for _ in range(work.together):
        submit()
    finished, busy_rate = 0, 0.0
    while finished < len(work.prompts):
        for event in emitted.get(timeout=120):
            if isinstance(event, SequenceFailed):
                raise RuntimeError(event.message)
            if isinstance(event, Token):
                first.setdefault(event.index, time.perf_counter() - submitted[event.index])
                tokens[event.index].append(ids[event.raw])
            if isinstance(event, Finished):
                finished += 1
                if len(submitted) < len(work.prompts):
                    submit()
                    busy_rate = sum(map(len, tokens)) / (time.perf_counter() - began)
    seconds = time.perf_counter() - began
    return Done(tokens, seconds, [first[index] for index in range(len(tokens))], busy_rate)
