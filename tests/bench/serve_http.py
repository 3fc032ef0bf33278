"""Measures the overhead of serving over the bare engine, and serving under releases, kills, overload and a soak."""

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.bench.figure import Figure
from tests.bench.serve_clients import Answer, Ask, Clients, ask_all, run_during
from tests.bench.serve_engine import Work, bare_engine, p99, random_prompts
from tests.bench.serve_world import CONTROLLER, ENGINE, INGRESS, PROXY, REPLICA, VERSIONS, World

CLIENTS = 16
OVERHEAD_ROUNDS = 7  # many, because the speed of the machine varies more than the overhead
ANSWER_TOKENS = 32
STEADY_SECONDS = 20.0
RELEASES = 100
RELEASES_BACK = 10
RETRY_SECONDS = 10.0  # for a response without Retry-After
RECOVERY_SECONDS = 60.0
WINDOW_SECONDS = 5.0
OVERLOAD_ROUNDS = 4
OVERLOAD_SECONDS = 30.0


def overhead_figures(world: World, folder: Path) -> list[Figure]:
    """Send the same requests to the bare engine and over HTTP and Serve, 16 at a time, with no streams and with half."""
    rng = random.Random(1)
    prompts = random_prompts(rng, 6 * CLIENTS)
    # Different lengths: clients in step would all finish at once and leave the engine idle.
    lengths = [64 + 128 * number // (len(prompts) - 1) for number in range(len(prompts))]
    rng.shuffle(lengths)
    bare, over_http, half_streamed = [], [], []
    with bare_engine(folder, 1) as engine:
        engine(Work(prompts[:CLIENTS], lengths[:CLIENTS], CLIENTS))
        for _ in range(OVERHEAD_ROUNDS):
            bare.append(engine(Work(prompts, lengths, CLIENTS)).rate)
            asks = [Ask(*pair) for pair in zip(prompts, lengths, strict=True)]
            over_http.append(_rate(world, asks))
            half_streamed.append(
                _rate(world, [replace(ask, stream=bool(number % 2)) for number, ask in enumerate(asks)])
            )
        unloaded = asyncio.run(
            ask_all(world.url, [Ask(prompt, 4, stream=True) for prompt in random_prompts(rng, 100)], 1)
        )
        mixed = [8 + 248 * number // 127 for number in range(128)]
        rng.shuffle(mixed)
        asks = [
            Ask(prompt, tokens, stream=True)
            for prompt, tokens in zip(random_prompts(rng, 128), mixed, strict=True)
        ]
        loaded = asyncio.run(ask_all(world.url, asks, CLIENTS))[CLIENTS:]
    first_alone, first_busy = [_first(answer) for answer in unloaded], [_first(answer) for answer in loaded]
    median = statistics.median
    return [
        Figure("over HTTP and Serve", "tokens/s, bare engine, 16 at once", median(bare)),
        Figure("over HTTP and Serve", "tokens/s", median(over_http)),
        Figure(
            "over HTTP and Serve",
            "% of the bare engine in that round",
            100 * median([ours / alone for ours, alone in zip(over_http, bare, strict=True)]),
            90,
            at_least=True,
        ),
        Figure("over HTTP and Serve", "tokens/s, half of them streams", median(half_streamed)),
        Figure(
            "over HTTP and Serve",
            "% of the bare engine in that round",
            100 * median([ours / alone for ours, alone in zip(half_streamed, bare, strict=True)]),
            90,
            at_least=True,
        ),
        Figure("over HTTP and Serve", "first token alone, p99 ms", 1e3 * p99(first_alone)),
        Figure("over HTTP and Serve", "first token among 16, p99 ms", 1e3 * p99(first_busy)),
        Figure("over HTTP and Serve", "times p99 alone", p99(first_busy) / p99(first_alone), 3.0),
    ]


def release_figures(world: World, releases: int = RELEASES) -> list[Figure]:
    """Release two versions in turn under 16 clients, half of them streaming. First every release loads its version anew;
    then some return to a version that is still loaded.
    """
    asks = _asks(random.Random(2))
    expected = _expected(world, asks)
    steady = Clients(world.url)
    asyncio.run(run_during(steady, asks, lambda: time.sleep(STEADY_SECONDS)))
    seconds: list[float] = []
    seconds_back: list[float] = []

    def release_in_turn() -> None:
        world.keep(0)
        for number in range(releases):
            seconds.append(world.release(VERSIONS[(number + 1) % 2]))
        world.keep(1)
        world.release(VERSIONS[1])
        for number in range(RELEASES_BACK):
            seconds_back.append(world.release(VERSIONS[number % 2]))

    clients = Clients(world.url)
    asyncio.run(run_during(clients, asks, release_in_turn))
    cut = [answer for answer in clients.answers if answer.status == 200 and not answer.whole]
    unknown = [
        answer for answer in clients.answers if answer.whole and answer.text not in expected[answer.version]
    ]
    name = f"{releases} releases under {CLIENTS} clients"
    return [
        Figure(name, "requests", len(clients.answers)),
        Figure(name, "failed", sum(answer.status != 200 for answer in clients.answers), 0),
        Figure(name, "streams cut or of mixed versions", len(cut), 0),
        Figure(name, "answers of no known version", len(unknown), 0),
        Figure(
            name,
            "versions that answered",
            len({answer.version for answer in clients.answers}),
            2,
            at_least=True,
        ),
        Figure(name, "release, p50 s", statistics.median(seconds)),
        Figure(name, "release, worst s", max(seconds)),
        Figure(name, "back to a loaded version, worst s", max(seconds_back)),
        Figure(name, "steady p99, ms", 1e3 * _p99(steady.answers)),
        Figure(name, "worst, ms", 1e3 * max(answer.seconds for answer in clients.answers)),
        Figure(
            name,
            "worst, times the steady p99",
            max(answer.seconds for answer in clients.answers) / _p99(steady.answers),
            3.0,
        ),
    ]


def kill_figures(world: World) -> list[Figure]:
    """Kill parts of serving with SIGKILL under 16 clients that retry once."""
    figures = []
    for part in (ENGINE, REPLICA, INGRESS, PROXY, CONTROLLER):
        figures += _killed(world, part)
    return figures


def _killed(world: World, part: str) -> list[Figure]:
    asks = _asks(random.Random(3), retry_seconds=RETRY_SECONDS)
    clients = Clients(world.url)
    killed_at: list[float] = []

    def kill() -> None:
        time.sleep(STEADY_SECONDS)
        killed_at.append(time.perf_counter())
        world.kill(part)
        time.sleep(RECOVERY_SECONDS + WINDOW_SECONDS)

    asyncio.run(run_during(clients, asks, kill))
    before = sum(
        killed_at[0] - STEADY_SECONDS / 2 < answer.ended_at <= killed_at[0] for answer in clients.answers
    )
    usual = before / (STEADY_SECONDS / 2)
    failed = [answer for answer in clients.answers if not answer.whole]
    for error, times in Counter(f"{answer.status} {answer.error[:200]}" for answer in failed).items():
        print(f"  {times} times: {error}", flush=True)
    name = f"kill -9 of {part.partition(':')[2] or part}"
    return [
        Figure(name, "requests", len(clients.answers)),
        Figure(name, "retried", sum(answer.attempts > 1 for answer in clients.answers)),
        Figure(name, "failed after a retry", len(failed), 0),
        Figure(
            name, "full capacity after, s", _recovered(clients.answers, killed_at[0], usual), RECOVERY_SECONDS
        ),
    ]


def _recovered(answers: Sequence[Answer], at: float, usual: float) -> float:
    """Seconds until the rate of whole answers in a window is back to 90 % of ``usual``."""
    ends = sorted(answer.ended_at - at for answer in answers if answer.whole and answer.ended_at > at)
    begin = 0.0
    while begin <= RECOVERY_SECONDS:
        if sum(begin < end <= begin + WINDOW_SECONDS for end in ends) >= 0.9 * usual * WINDOW_SECONDS:
            return begin
        begin += 0.5
    return float("inf")


def overload_figures(world: World) -> list[Figure]:
    """Alternate between as many clients as the engine has slots and four times as many. Clients heed Retry-After.

    All prompts differ. Otherwise the engine could cache the prompts of the few clients, but not those of the crowd.
    """
    rng = random.Random(4)
    asks = _asks(rng)
    crowd = [ask for _ in range(4) for ask in _asks(rng)]

    def run_clients(asks: Sequence[Ask], seconds: float) -> list[Answer]:
        clients = Clients(world.url, lambda: random_prompts(rng, 1)[0])
        asyncio.run(run_during(clients, asks, lambda: time.sleep(seconds), heed_retry_after=True))
        return clients.answers

    steady, overload = [], []
    for _ in range(OVERLOAD_ROUNDS):
        steady.append(run_clients(asks, STEADY_SECONDS))
        overload.append(run_clients(crowd, OVERLOAD_SECONDS))
    began = time.perf_counter()
    after = run_clients(asks, STEADY_SECONDS)
    usual = statistics.median(map(_p99, steady))
    late = [answer.ended_at - began for answer in after if not answer.whole or answer.seconds > 1.5 * usual]
    answers = [answer for round in overload for answer in round]
    rejected = [answer for answer in answers if answer.status == 429]
    others = [answer for answer in answers if answer.status not in (200, 429)]
    accepted = [[answer for answer in round if answer.status == 200] for round in overload]
    slower = [_p99(theirs) / _p99(own) for theirs, own in zip(accepted, steady, strict=True)]
    rates = [_throughput(theirs) / _throughput(own) for theirs, own in zip(accepted, steady, strict=True)]
    name = "4 times the load"
    return [
        Figure(name, "accepted", sum(map(len, accepted))),
        Figure(name, "answered with 429", len(rejected), 1, at_least=True),
        Figure(name, "without Retry-After", sum(not answer.retry_after for answer in rejected), 0),
        Figure(name, "failed otherwise", len(others), 0),
        Figure(name, "steady p99, ms", 1e3 * usual),
        Figure(name, "accepted p99, times the steady p99", statistics.median(slower), 2.0),
        Figure(name, "the same in the worst round", max(slower)),
        Figure(name, "tokens/s, % of the steady rate", 100 * statistics.median(rates)),
        Figure(name, "back to the steady p99 after, s", max(late, default=0.0), 10.0),
    ]


def soak_figures(world: World, minutes: float) -> list[Figure]:
    """Run 16 clients with one release per minute, and measure the growth of memory."""
    asks = _asks(random.Random(5))
    clients = Clients(world.url)
    samples: list[dict[str, int]] = []

    def watch() -> None:
        ends = time.monotonic() + 60 * minutes
        number = 0
        while time.monotonic() < ends:
            time.sleep(min(15.0, max(ends - time.monotonic(), 0)))
            samples.append(world.serving_bytes())
            number += 1
            if number % 4 == 0:
                world.release(VERSIONS[number // 4 % 2])

    asyncio.run(run_during(clients, asks, watch))
    quarter = max(len(samples) // 4, 1)
    figures = [
        Figure(f"{minutes:g} minutes", "requests", len(clients.answers)),
        Figure(f"{minutes:g} minutes", "failed", sum(not answer.whole for answer in clients.answers), 0),
    ]
    for part in samples[0]:
        early = statistics.median(sample[part] for sample in samples[quarter : 2 * quarter])
        late = statistics.median(sample[part] for sample in samples[-quarter:])
        name = part.partition(":")[2] or part
        figures += [
            Figure(f"{minutes:g} minutes", f"{name}, MiB", late / (1 << 20)),
            Figure(f"{minutes:g} minutes", f"{name}, growth, %", 100 * (late / early - 1), 2.0),
        ]
    return figures


def _asks(rng: random.Random, retry_seconds: float | None = None) -> list[Ask]:
    """One request per client, half of them streaming."""
    prompts = random_prompts(rng, CLIENTS)
    return [
        Ask(prompt, ANSWER_TOKENS, stream=bool(number % 2), retry_seconds=retry_seconds)
        for number, prompt in enumerate(prompts)
    ]


def _expected(world: World, asks: Sequence[Ask]) -> dict[str, set[str]]:
    """The expected answers of each version by number, requested by version while both are loaded."""
    world.release(VERSIONS[1])
    world.release(VERSIONS[0])
    texts: dict[str, set[str]] = {}
    for number in VERSIONS:
        pinned = [Ask(ask.prompt, ask.max_tokens, version=number) for ask in asks]
        answers = asyncio.run(ask_all(world.url, pinned, CLIENTS))
        assert all(answer.whole for answer in answers), [answer.error for answer in answers]
        texts[str(number)] = {answer.text for answer in answers}
    assert not texts["1"] & texts["2"]
    return texts


def _rate(world: World, asks: Sequence[Ask]) -> float:
    began = time.perf_counter()
    answers = asyncio.run(ask_all(world.url, asks, CLIENTS))
    assert all(answer.whole for answer in answers), [answer.error for answer in answers]
    return sum(answer.num_tokens for answer in answers) / (time.perf_counter() - began)


def _throughput(answers: Sequence[Answer]) -> float:
    whole = [answer for answer in answers if answer.whole]
    return sum(answer.num_tokens for answer in whole) / (
        max(answer.ended_at for answer in whole) - min(answer.sent_at for answer in whole)
    )


def _p99(answers: Sequence[Answer]) -> float:
    return p99([answer.seconds for answer in answers if answer.whole])


def _first(answer: Answer) -> float:
    assert answer.first_seconds is not None, answer.error
    return answer.first_seconds
