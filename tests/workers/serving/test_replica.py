import asyncio
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from service.artifacts import Artifacts
from service.core.serving import ServedTarget
from tests.support.waiting import until
from tests.workers.serving.scripted_engines import Loader
from tests.workers.serving.serving_line import failures, line, trying, version
from workers.serving.generation import (
    Answer,
    Finished,
    Generation,
    Prompt,
    Refused,
    Sampling,
    Started,
    Token,
)
from workers.serving.metrics import metrics_response
from workers.serving.replica import Replica

PROMPT = "The cat sat on"


@pytest.fixture
def replica(artifacts: Artifacts, loader: Loader) -> Iterator[Replica]:
    replica = Replica("replica-0", artifacts.open, loader)
    yield replica
    replica.close()


def generation(
    prompts: tuple[Prompt, ...] = (PROMPT,),
    *,
    n: int = 1,
    stream: bool = False,
    version: int | None = None,
    affinity: str | None = None,
    **sampling: Any,
) -> Generation:
    chosen = Sampling(**{"max_tokens": 10, "temperature": 0.0, **sampling})
    return Generation("line", prompts, chosen, n=n, stream=stream, version=version, affinity=affinity)


async def collect(replica: Replica, request: Generation) -> list[Answer]:
    return [item async for batch in replica.generate(request) for item in batch]


def ask(replica: Replica, request: Generation) -> list[Answer]:
    return asyncio.run(collect(replica, request))


def number(answer: list[Answer]) -> int:
    assert isinstance(answer[0], Started), answer[0]
    return answer[0].number


def refusal(answer: list[Answer]) -> Refused:
    assert isinstance(answer[-1], Refused), answer[-1]
    return answer[-1]


def text(answer: list[Answer]) -> str:
    return "".join(item.text for item in answer if isinstance(item, Token | Finished))


def metrics_of(replica: Replica) -> bytes:
    return bytes(metrics_response(replica.metrics()).body)


def serve(replica: Replica, number_: int) -> None:
    replica.set_target(line(number_))
    assert replica.wait_until_settled(30)


def test_before_a_release_and_while_loading_it_says_so(replica: Replica, loader: Loader) -> None:
    assert "released" in refusal(ask(replica, generation())).message
    assert refusal(ask(replica, generation())).status == 503
    loader.gate.clear()
    replica.set_target(line(1))
    assert "being loaded" in refusal(ask(replica, generation())).message
    assert replica.report().number is None
    loader.gate.set()
    assert replica.wait_until_settled(30)
    assert replica.report().number == 1
    assert number(ask(replica, generation())) == 1


def test_a_swap_under_streams_drops_nothing_mixes_nothing_and_frees_the_old_version(
    replica: Replica, loader: Loader
) -> None:
    serve(replica, 1)
    expected = {1: text(ask(replica, generation(max_tokens=20)))}

    async def client(until: asyncio.Event) -> list[list[Answer]]:
        answers: list[list[Answer]] = []
        while not until.is_set():
            answers.append(await collect(replica, generation(max_tokens=20, stream=True)))
        return answers

    async def swap() -> list[list[list[Answer]]]:
        until = asyncio.Event()
        clients = [asyncio.create_task(client(until)) for _ in range(8)]
        await asyncio.sleep(0.3)
        replica.set_target(line(2))
        assert await asyncio.to_thread(replica.wait_until_settled, 30)
        await asyncio.sleep(0.3)
        until.set()
        return await asyncio.gather(*clients)

    by_client = asyncio.run(swap())
    expected[2] = text(ask(replica, generation(max_tokens=20)))
    assert expected[1] != expected[2]
    # A stream of the old version may end after one of the new; but who has seen the new sees the old no more.
    for answers in by_client:
        assert [number(answer) for answer in answers] == sorted(number(answer) for answer in answers)
    answers = [answer for of_client in by_client for answer in of_client]
    assert {number(answer) for answer in answers} == {1, 2}
    for answer in answers:
        assert not any(isinstance(item, Refused) for item in answer)
        assert text(answer) == expected[number(answer)]
    until(lambda: gc.collect() >= 0 and loader.engines[0]() is None)
    assert loader.engines[1]() is not None


def test_a_stream_keeps_the_version_it_began_with_and_only_then_is_it_freed(
    replica: Replica, loader: Loader
) -> None:
    serve(replica, 1)

    async def stream_over_a_swap() -> list[Answer]:
        stream = replica.generate(generation((PROMPT, "the dog"), n=2, max_tokens=60, stream=True))
        answer = await anext(stream)
        replica.set_target(line(2))
        assert await asyncio.to_thread(replica.wait_until_settled, 30)
        assert number(await collect(replica, generation())) == 2
        assert loader.engines[0]() is not None
        assert b'requests_total{model="line",replica="replica-0",version="1"}' in metrics_of(replica)
        async for batch in stream:
            answer = answer + batch
        return answer

    answer = asyncio.run(stream_over_a_swap())
    assert number(answer) == 1
    assert sum(isinstance(item, Finished) for item in answer) == 4
    until(lambda: gc.collect() >= 0 and loader.engines[0]() is None)
    assert b'version="1"' not in metrics_of(replica)


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_and_is_reported(
    replica: Replica, artifacts: Artifacts
) -> None:
    serve(replica, 1)
    for broken, key, reason in (
        (2, "export/broken", "not finite"),
        (3, "export/missing", "ArtifactMissing"),
    ):
        replica.set_target(line(broken, key))
        assert replica.wait_until_settled(30)
        report = replica.report()
        assert report.number == 1
        [(failed, error)] = failures(report).items()
        assert failed == broken
        assert reason in (error or "")
        assert number(ask(replica, generation())) == 1
    serve(replica, 2)
    assert not failures(replica.report())


def test_a_failed_first_version_answers_503(replica: Replica) -> None:
    replica.set_target(line(1, "export/missing"))
    assert replica.wait_until_settled(30)
    assert refusal(ask(replica, generation())).status == 503
    assert "could not be loaded" in refusal(ask(replica, generation())).message


def test_a_failed_load_is_tried_again(artifacts: Artifacts, loader: Loader) -> None:
    replica = Replica("replica-0", artifacts.open, loader, retry_seconds=0.05)
    loader.errors = [MemoryError("too little"), OSError("store away")]
    replica.set_target(line(1))
    until(lambda: replica.report().number == 1)
    assert not failures(replica.report())
    replica.close()


def test_the_same_target_again_loads_nothing(replica: Replica, loader: Loader) -> None:
    serve(replica, 1)
    serve(replica, 1)
    assert loader.folders == ["1"]


def test_the_latest_target_wins(replica: Replica, loader: Loader) -> None:
    serve(replica, 1)
    loader.gate.clear()
    replica.set_target(line(2))
    until(lambda: loader.folders == ["1", "2"])
    replica.set_target(line(3))
    loader.gate.set()
    assert replica.wait_until_settled(30)
    assert replica.report().number == 3
    assert loader.folders == ["1", "2", "3"]


def test_back_to_the_version_that_answers_while_another_loads(replica: Replica, loader: Loader) -> None:
    serve(replica, 1)
    loader.gate.clear()
    replica.set_target(line(2))
    until(lambda: loader.folders == ["1", "2"])
    replica.set_target(line(1))
    assert replica.wait_until_settled(0)
    loader.gate.set()
    until(lambda: len(loader.engines) == 2 and loader.engines[1]() is None)
    assert number(ask(replica, generation())) == 1


def test_no_target_any_more_means_no_answer(replica: Replica) -> None:
    serve(replica, 1)
    replica.set_target(ServedTarget("line", None))
    assert refusal(ask(replica, generation())).status == 503


def test_an_abandoned_stream_stops_decoding_and_gives_its_engine_back(
    replica: Replica, loader: Loader
) -> None:
    serve(replica, 1)

    async def abandon() -> None:
        stream = replica.generate(generation(n=16, max_tokens=100, stream=True))
        await anext(stream)
        await stream.aclose()

    asyncio.run(abandon())
    serve(replica, 2)
    until(lambda: gc.collect() >= 0 and loader.engines[0]() is None)


def test_choices_are_numbered_prompts_first_and_have_seeds_of_their_own(replica: Replica) -> None:
    serve(replica, 1)
    request = generation((PROMPT, "the dog"), n=3, temperature=1.0, seed=5)
    answer = ask(replica, request)
    texts = {
        index: text([item for item in answer if getattr(item, "index", None) == index]) for index in range(6)
    }
    assert len(set(texts.values())) == 6
    again = ask(replica, request)
    assert texts == {
        index: text([item for item in again if getattr(item, "index", None) == index]) for index in range(6)
    }


@pytest.mark.parametrize(
    ("request_", "param", "fragment"),
    [
        (generation(((1, 2, 10_000),)), "prompt", "vocabulary"),
        (generation(((),)), "prompt", "empty"),
        (generation(max_tokens=1000), "prompt", "maximum context length is 128"),
        (generation((tuple(range(128)),), max_tokens=None), "prompt", "maximum context length"),
        (generation(("a",) * 300, n=2), "n", "512"),
    ],
)
def test_what_a_version_cannot_serve_is_refused(
    replica: Replica, request_: Generation, param: str, fragment: str
) -> None:
    serve(replica, 1)
    refused = refusal(ask(replica, request_))
    assert (refused.status, refused.param) == (400, param)
    assert fragment in refused.message


def test_a_version_on_trial_answers_its_share_the_same_ones_again_and_again(replica: Replica) -> None:
    replica.set_target(trying(1, version(2), share=0.3))
    assert replica.wait_until_settled(30)
    assert replica.report().number == 1
    requests = [generation(max_tokens=1, affinity=f"user {user}") for user in range(60)]
    answered = [number(ask(replica, request)) for request in requests]
    assert set(answered) == {1, 2}
    assert 6 <= answered.count(2) <= 32
    assert [number(ask(replica, request)) for request in requests] == answered
    unnamed = [number(ask(replica, generation(max_tokens=1))) for _ in range(60)]
    assert 6 <= unnamed.count(2) <= 32
    held = {held.number: held for held in replica.report().versions}
    assert held[2].tried.requests == 2 * answered.count(2) + unnamed.count(2)
    assert held[1].tried.requests == 180 - held[2].tried.requests
    # What it has answered before does not count for the next trial.
    replica.set_target(replace(trying(1, version(3), share=1.0), sequence=1))
    assert replica.wait_until_settled(30)
    assert number(ask(replica, generation())) == 3
    held = {held.number: held for held in replica.report().versions}
    assert (held[1].tried.requests, held[3].tried.requests) == (0, 1)
    assert held[1].traffic.requests > 60


def test_what_a_version_on_trial_fails_the_served_one_answers(replica: Replica, loader: Loader) -> None:
    replica.set_target(trying(1, version(2), share=1.0))
    assert replica.wait_until_settled(30)
    assert number(ask(replica, generation())) == 2
    loader.engine("2").fails = True
    for stream in (False, True):
        assert number(ask(replica, generation(stream=stream))) == 1
    held = {held.number: held for held in replica.report().versions}
    assert (held[2].tried.requests, held[2].tried.failures) == (3, 2)
    assert (held[1].tried.requests, held[1].tried.failures) == (2, 0)
    # Asked for by number it is not another that answers.
    assert refusal(ask(replica, generation(version=2))).status == 500


def test_what_a_version_on_trial_cannot_even_take_the_served_one_answers_and_it_counts(
    replica: Replica, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E.g. because of a chat template of its own."""
    replica.set_target(trying(1, version(2), share=1.0))
    assert replica.wait_until_settled(30)

    def raise_it(_: str) -> tuple[int, ...]:
        raise KeyError("content")

    monkeypatch.setattr(loader.engine("2"), "encode", raise_it)
    for stream in (False, True):
        assert number(ask(replica, generation(stream=stream))) == 1
    held = {held.number: held for held in replica.report().versions}
    assert (held[2].tried.requests, held[2].tried.failures) == (2, 2)
    monkeypatch.setattr(loader.engine("1"), "encode", raise_it)
    assert refusal(ask(replica, generation())).status == 500


def test_what_a_version_fails_to_score_counts(replica: Replica, loader: Loader) -> None:
    replica.set_target(trying(1, version(2), share=1e-9, shadowed=1.0, scored=True))
    assert replica.wait_until_settled(30)
    loader.engine("2").fails = True

    async def answer() -> None:
        assert number(await collect(replica, generation(affinity="somebody"))) == 1
        await asyncio.gather(*replica._shadows)

    asyncio.run(answer())
    held = {held.number: held for held in replica.report().versions}
    assert (held[2].tried.requests, held[2].tried.failures) == (1, 1)
    assert held[1].tried.failures == 0


def test_what_a_version_on_trial_has_no_room_for_the_served_one_answers(
    replica: Replica, loader: Loader
) -> None:
    replica.set_target(trying(1, version(2), share=1.0))
    assert replica.wait_until_settled(30)
    loader.engine("2").full = True
    for stream in (False, True):
        assert number(ask(replica, generation(stream=stream))) == 1
    assert refusal(ask(replica, generation(version=2))).status == 429
    held = {held.number: held for held in replica.report().versions}
    assert (held[2].tried.requests, held[2].tried.refused) == (0, 3)
    loader.engine("1").full = True
    refused = refusal(ask(replica, generation()))
    assert (refused.status, refused.retry_after_seconds) == (429, 7)


def test_whom_it_has_no_room_for_it_does_no_work_for(
    replica: Replica, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(replica, 1)
    engine = loader.engine("1")
    encoded: list[str] = []
    encode = engine.encode
    monkeypatch.setattr(engine, "encode", lambda text: encoded.append(text) or encode(text))
    engine.full = True
    assert refusal(ask(replica, generation())).status == 429
    assert encoded == []
    engine.full = False
    ask(replica, generation())
    assert encoded == [PROMPT]


def test_whose_client_leaves_before_the_end_is_counted_apart(replica: Replica) -> None:
    serve(replica, 1)

    async def leave(*, whole: bool) -> None:
        stream = replica.generate(generation(max_tokens=3 if whole else 100, stream=True))
        async for _ in stream:
            if not whole:
                break
        await stream.aclose()

    asyncio.run(leave(whole=True))
    asyncio.run(leave(whole=False))
    [held] = replica.report().versions
    assert (held.traffic.requests, held.traffic.departed) == (1, 1)


def test_a_pinned_version_that_is_still_being_loaded_is_awaited_by_who_asks(
    replica: Replica, loader: Loader
) -> None:
    serve(replica, 1)
    loader.gate.clear()
    replica.set_target(line(1, kept=(version(2),)))
    refused = refusal(ask(replica, generation(version=2)))
    assert (refused.status, refused.code) == (503, "model_not_ready")
    assert refused.retry_after_seconds
    loader.gate.set()
    assert replica.wait_until_settled(30)
    assert number(ask(replica, generation(version=2))) == 2


def test_any_loaded_version_answers_by_number_and_no_other(replica: Replica) -> None:
    replica.set_target(line(1, kept=(version(2),)))
    assert replica.wait_until_settled(30)
    texts = {asked: text(ask(replica, generation(version=asked))) for asked in (1, 2)}
    assert [number(ask(replica, generation(version=asked))) for asked in (1, 2, None)] == [1, 2, 1]
    assert texts[1] != texts[2]
    refused = refusal(ask(replica, generation(version=3)))
    assert (refused.status, refused.code) == (404, "model_not_found")
    assert "loaded are: 1, 2" in refused.message
    # Rolled back to what is loaded: at once.
    replica.set_target(line(2, kept=(version(1),)))
    assert number(ask(replica, generation())) == 2


def test_a_version_in_the_shadow_is_counted_and_scored_and_answers_nobody(replica: Replica) -> None:
    replica.set_target(trying(1, version(2), shadowed=1.0, scored=True))
    assert replica.wait_until_settled(30)

    async def some() -> list[int]:
        numbers = [number(await collect(replica, generation())) for _ in range(5)]
        for _ in range(200):
            scored = [held.tried.scored_tokens for held in replica.report().versions]
            if min(scored) >= 5:
                break
            await asyncio.sleep(0.05)
        return numbers

    assert asyncio.run(some()) == [1] * 5
    served, tried = replica.report().versions
    assert served.tried.requests == 5
    assert 1 <= tried.tried.requests <= 5
    assert served.tried.scored_tokens == tried.tried.scored_tokens >= 5
    for held in (served, tried):
        scoring = generation(version=held.number, max_tokens=0, echo=True, num_logprobs=0)
        tokens = [item for item in ask(replica, scoring) if isinstance(item, Token)]
        logprobs = [token.logprob for token in tokens if token.logprob is not None]
        assert held.tried.loss == pytest.approx(-sum(logprobs) / len(logprobs), rel=1e-4)
    assert served.tried.loss != tried.tried.loss


def test_prometheus_is_told_by_model_version_and_replica(replica: Replica) -> None:
    replica.set_target(line(1, kept=(version(2),)))
    assert replica.wait_until_settled(30)
    ask(replica, generation(max_tokens=5))
    ask(replica, generation(max_tokens=7, version=2, stream=True))
    exposed = bytes(metrics_response(replica.metrics()).body).decode()
    labels = 'model="line",replica="replica-0"'
    assert f'pathswitch_inference_output_tokens_total{{{labels},version="1"}} 5.0' in exposed
    assert f'pathswitch_inference_output_tokens_total{{{labels},version="2"}} 7.0' in exposed
    assert f'pathswitch_inference_first_token_seconds_count{{{labels},version="2"}} 1.0' in exposed
    assert f'pathswitch_inference_versions{{{labels},state="ready",version="2"}} 1.0' in exposed
    assert f'pathswitch_inference_refused_total{{{labels},version="1"}} 0.0' in exposed
    assert f'pathswitch_inference_token_seconds_bucket{{le="+Inf",{labels},version="1"}} 1.0' in exposed
    assert f'pathswitch_inference_waiting{{{labels},version="1"}} 0.0' in exposed
    assert f"pathswitch_inference_served_version{{{labels}}} 1.0" in exposed
    assert exposed.count("# TYPE pathswitch_inference_running gauge") == 1
