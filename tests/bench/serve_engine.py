"""The bare engine against transformers' ``generate``: same prompts, same threads, a process each, in turns."""

import multiprocessing
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
from workers.serving.engine.detokenizer import Vocabulary
from workers.serving.engine.memory import this_device
from workers.serving.engine.port import EngineEvent, SequenceFailed, SequenceRequest
from workers.serving.engine.transformers_engine import TransformersEngine
from workers.serving.generation import Finished, Sampling, Token
from workers.training.pretrained import load_model

SLOTS = 16
PROMPT_TOKENS = 32
EQUAL_TOKENS = 128
SHORTEST, LONGEST = 8, 256
MIXED_REQUESTS = 128
SEQUENTIAL_REQUESTS = 3  # of the 16: one takes as long as another
ROUNDS = 9  # of equal lengths: each takes two seconds, and the machine's own speed varies
MIXED_ROUNDS = 5
ALONE_REQUESTS = 100  # whose first token is waited for with nobody else there
TIED = 1e-4  # logits: what two orders of summing in float32 make of one sum


@dataclass(frozen=True)
class Work:
    """Prompts to continue greedily, each by so many tokens. ``together``: how many at once."""

    prompts: list[list[int]]
    lengths: list[int]
    together: int


@dataclass(frozen=True)
class Done:
    """Tokens of every sequence, how long it all took, and when each sequence's first token came after it was asked for.

    ``busy_rate``: tokens per second until the last sequence was asked for, while as many as may be were in flight.
    """

    tokens: list[list[int]]
    seconds: float
    first_seconds: list[float]
    busy_rate: float = 0.0

    @property
    def rate(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


def engine_figures(folder: Path, threads: int, name: str) -> list[Figure]:
    """``threads`` 0: as many as torch takes. On a GPU nothing is promised: the targets are of a CPU."""
    figures = _engine_figures(folder, threads, name)
    return figures if this_device().type == "cpu" else [replace(one, target=None) for one in figures]


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
    # The first 16 come all at once, and wait for each other's prompts: those after them meet the load.
    loaded = [seconds for done in ours_mixed for seconds in done.first_seconds[SLOTS:]]
    unloaded = [seconds for done in ours_alone for seconds in done.first_seconds]
    return [
        Figure(name, "tokens/s, generate one by one", _rate(one)),
        Figure(name, "tokens/s, generate 16 as a batch", _rate(batch)),
        Figure(name, "tokens/s, engine, 16 at once", _rate(ours)),
        Figure(name, "times one by one", _times(ours, one), 8.0, at_least=True),
        Figure(name, "times the batch, equal lengths", _times(ours, batch), 1.4, at_least=True),
        Figure(name, "tokens/s, batch, 8 to 256 tokens", _rate(batch_mixed)),
        Figure(name, "tokens/s, engine, 8 to 256 tokens", _rate(ours_mixed)),
        Figure(name, "times the batch, mixed lengths", _times(ours_mixed, batch_mixed), 2.5, at_least=True),
        Figure(
            name,
            "the same, while 16 are in flight",
            statistics.median(
                own.busy_rate / other.rate for own, other in zip(ours_mixed, batch_mixed, strict=True)
            ),
        ),
        Figure(name, f"of {SLOTS + MIXED_REQUESTS} answers, not as generate's", len(differing)),
        Figure(name, "their gap in float64, largest, logits", max(gaps, default=0.0), TIED),
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
    """What each has done, round by round: in every round one after another."""
    done: list[list[Done]] = [[] for _ in pairs]
    for _ in range(rounds):
        for (process, work), own in zip(pairs, done, strict=True):
            own.append(process(work))
    return done


def _rate(rounds: Sequence[Done]) -> float:
    return statistics.median(done.rate for done in rounds)


def _times(ours: Sequence[Done], theirs: Sequence[Done]) -> float:
    """How many times as fast, in the same round: the median."""
    return statistics.median(own.rate / other.rate for own, other in zip(ours, theirs, strict=True))


def _differences(work: Work, ours: Done, theirs: Done) -> list[tuple[list[int], int, int]]:
    """Of every sequence that is not the same: what both have begun with, and how each went on."""
    differences = []
    for prompt, own, other in zip(work.prompts, ours.tokens, theirs.tokens, strict=True):
        at = next((at for at, pair in enumerate(zip(own, other, strict=True)) if pair[0] != pair[1]), None)
        if at is not None:
            differences.append((prompt + own[:at], own[at], other[at]))
    return differences


@torch.inference_mode()
def _gaps(folder: Path, differences: Sequence[tuple[list[int], int, int]]) -> list[float]:
    """How far apart the two tokens are for the model in float64."""
    model: Any = load_model(folder, dtype=torch.float64).eval()
    gaps = []
    for begun, own, other in differences:
        logits_V = model(torch.tensor([begun])).logits[0, -1]
        gaps.append(abs(float(logits_V[own] - logits_V[other])))
    return gaps


def bare_engine(folder: Path, threads: int) -> AbstractContextManager[Callable[[Work], Done]]:
    """The engine alone in a process, asked without HTTP."""
    return _process(_decode, folder, threads)


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
    """So many clients, each of which asks again as soon as it is answered."""
    emitted: queue.SimpleQueue[list[EngineEvent]] = queue.SimpleQueue()
    tokens: list[list[int]] = [[] for _ in work.prompts]
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
    finished, busy_rate = 0, 0.0
    while finished < len(work.prompts):
        for event in emitted.get(timeout=120):
            if isinstance(event, SequenceFailed):
                raise RuntimeError(event.message)
            if isinstance(event, Token):
                first.setdefault(event.index, time.perf_counter() - asked[event.index])
                tokens[event.index].append(ids[event.raw])
            if isinstance(event, Finished):
                finished += 1
                if len(asked) < len(work.prompts):
                    ask()
                    busy_rate = sum(map(len, tokens)) / (time.perf_counter() - began)
    seconds = time.perf_counter() - began
    return Done(tokens, seconds, [first[index] for index in range(len(tokens))], busy_rate)
