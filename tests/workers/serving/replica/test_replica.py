"""The requests that a replica answers: swaps, trials, shadow traffic, pinned versions, failures."""

import asyncio
import gc
from dataclasses import replace
from unittest.mock import Mock

import pytest

from service.artifacts import Artifacts
from service.core.serving import ServedTarget
from tests.support.waiting import until
from tests.workers.serving.replica.loading import is_settled, load, wait_until_settled
from tests.workers.serving.replica.requests import PROMPT, ask, collect, generation, number, rejection, text
from tests.workers.serving.scripted_engines import ScriptedLoader
from tests.workers.serving.serving_line import failures, line, trying, version
from workers.serving.generation import AnswerItem, Finished, Generation, RequestRejected, Token
from workers.serving.openai.metrics import metrics_response
from workers.serving.replica.replica import Replica


def metrics_of(replica: Replica) -> bytes:
    return bytes(metrics_response(replica.metrics()).body)


def serve(replica: Replica, number_: int) -> None:
    load(replica.pool, line(number_))


def test_requests_before_a_release_and_while_loading_are_rejected_with_the_reason(
    replica: Replica, loader: ScriptedLoader
) -> None:
    assert "released" in rejection(ask(replica, generation())).message
    assert rejection(ask(replica, generation())).status == 503
    loader.gate.clear()
    replica.pool.set_target(line(1))
    assert "being loaded" in rejection(ask(replica, generation())).message
    assert replica.pool.report().number is None
    loader.gate.set()
    wait_until_settled(replica.pool)
    assert replica.pool.report().number == 1
    assert number(ask(replica, generation())) == 1


def test_a_swap_under_streams_drops_no_request_mixes_no_versions_and_frees_the_old_one(
    replica: Replica, loader: ScriptedLoader
) -> None:
    serve(replica, 1)
    expected = {1: text(ask(replica, generation(max_tokens=20)))}

    async def client(stop: asyncio.Event) -> list[list[AnswerItem]]:
        answers: list[list[AnswerItem]] = []
        while not stop.is_set():
            answers.append(await collect(replica, generation(max_tokens=20, stream=True)))
        return answers

    async def swap() -> list[list[list[AnswerItem]]]:
        stop = asyncio.Event()
        clients = [asyncio.create_task(client(stop)) for _ in range(8)]
        await asyncio.sleep(0.3)
        replica.pool.set_target(line(2))
        await asyncio.to_thread(wait_until_settled, replica.pool)
        await asyncio.sleep(0.3)
        stop.set()
        return await asyncio.gather(*clients)

    by_client = asyncio.run(swap())
    expected[2] = text(ask(replica, generation(max_tokens=20)))
    assert expected[1] != expected[2]
    # A stream of the old version may end after one of the new, but no client goes back to the old version.
    for answers in by_client:
        assert [number(answer) for answer in answers] == sorted(number(answer) for answer in answers)
    answers = [answer for client_answers in by_client for answer in client_answers]
    assert {number(answer) for answer in answers} == {1, 2}
    for answer in answers:
        assert not any(isinstance(item, RequestRejected) for item in answer)
        assert text(answer) == expected[number(answer)]
    until(lambda: gc.collect() >= 0 and loader.engines[0]() is None)
    assert loader.engines[1]() is not None


def test_a_stream_keeps_its_version_which_is_freed_when_the_stream_ends(
    replica: Replica, loader: ScriptedLoader
) -> None:
    serve(replica, 1)

    async def stream_over_a_swap() -> list[AnswerItem]:
        stream = replica.generate(generation((PROMPT, "the dog"), n=2, max_tokens=60, stream=True))
        answer = await anext(stream)
        replica.pool.set_target(line(2))
        await asyncio.to_thread(wait_until_settled, replica.pool)
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


def test_a_version_that_cannot_be_loaded_is_reported_and_the_old_one_goes_on(
    replica: Replica, artifacts: Artifacts
) -> None:
    serve(replica, 1)
    for broken, key, reason in (
        (2, "export/broken", "not finite"),
        (3, "export/missing", "ArtifactMissing"),
    ):
        load(replica.pool, line(broken, key))
        report = replica.pool.report()
        assert report.number == 1
        [(failed, error)] = failures(report).items()
        assert failed == broken
        assert reason in (error or "")
        assert number(ask(replica, generation())) == 1
    serve(replica, 2)
    assert not failures(replica.pool.report())


def test_a_failed_first_version_answers_503(replica: Replica) -> None:
    load(replica.pool, line(1, "export/missing"))
    assert rejection(ask(replica, generation())).status == 503
    assert "could not be loaded" in rejection(ask(replica, generation())).message


def test_a_failed_load_is_tried_again(artifacts: Artifacts, loader: ScriptedLoader) -> None:
    replica = Replica("replica-0", artifacts.open, loader, retry_seconds=0.05)
    loader.errors = [MemoryError("too little"), OSError("store unavailable")]
    replica.pool.set_target(line(1))
    until(lambda: replica.pool.report().number == 1)
    assert not failures(replica.pool.report())
    replica.pool.close()


def test_the_same_target_again_loads_nothing(replica: Replica, loader: ScriptedLoader) -> None:
    serve(replica, 1)
    serve(replica, 1)
    assert loader.folders == ["1"]


def test_the_latest_target_wins(replica: Replica, loader: ScriptedLoader) -> None:
    serve(replica, 1)
    loader.gate.clear()
    replica.pool.set_target(line(2))
    until(lambda: loader.folders == ["1", "2"])
    replica.pool.set_target(line(3))
    loader.gate.set()
    wait_until_settled(replica.pool)
    assert replica.pool.report().number == 3
    assert loader.folders == ["1", "2", "3"]


def test_the_target_can_return_to_the_served_version_while_another_loads(
    replica: Replica, loader: ScriptedLoader
) -> None:
    serve(replica, 1)
    loader.gate.clear()
    replica.pool.set_target(line(2))
    until(lambda: loader.folders == ["1", "2"])
    replica.pool.set_target(line(1))
    assert is_settled(replica.pool)
    loader.gate.set()
    until(lambda: len(loader.engines) == 2 and loader.engines[1]() is None)
    assert number(ask(replica, generation())) == 1


def test_without_a_target_requests_are_rejected(replica: Replica) -> None:
    serve(replica, 1)
    replica.pool.set_target(ServedTarget("line", None))
    assert rejection(ask(replica, generation())).status == 503


def test_an_abandoned_stream_stops_decoding_and_releases_its_engine(
    replica: Replica, loader: ScriptedLoader
) -> None:
    serve(replica, 1)

    async def abandon() -> None:
        stream = replica.generate(generation(n=16, max_tokens=100, stream=True))
        await anext(stream)
        await stream.aclose()

    asyncio.run(abandon())
    serve(replica, 2)
    until(lambda: gc.collect() >= 0 and loader.engines[0]() is None)


def test_choices_are_grouped_by_prompt_and_have_different_seeds(replica: Replica) -> None:
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
def test_requests_that_a_version_cannot_serve_are_rejected(
    replica: Replica, request_: Generation, param: str, fragment: str
) -> None:
    serve(replica, 1)
    rejected = rejection(ask(replica, request_))
    assert (rejected.status, rejected.param) == (400, param)
    assert fragment in rejected.message


def test_a_version_on_trial_answers_its_share_and_the_same_users_every_time(replica: Replica) -> None:
    load(replica.pool, trying(1, version(2), share=0.3))
    assert replica.pool.report().number == 1
    requests = [generation(max_tokens=1, affinity=f"user {user}") for user in range(60)]
    answered = [number(ask(replica, request)) for request in requests]
    assert set(answered) == {1, 2}
    assert 6 <= answered.count(2) <= 32
    assert [number(ask(replica, request)) for request in requests] == answered
    without_affinity = [number(ask(replica, generation(max_tokens=1))) for _ in range(60)]
    assert 6 <= without_affinity.count(2) <= 32
    versions = {report.number: report for report in replica.pool.report().versions}
    assert versions[2].tried.requests == 2 * answered.count(2) + without_affinity.count(2)
    assert versions[1].tried.requests == 180 - versions[2].tried.requests
    # Requests from before do not count for the next trial.
    load(replica.pool, replace(trying(1, version(3), share=1.0), sequence=1))
    assert number(ask(replica, generation())) == 3
    versions = {report.number: report for report in replica.pool.report().versions}
    assert (versions[1].tried.requests, versions[3].tried.requests) == (0, 1)
    assert versions[1].traffic.requests > 60


def test_the_served_version_answers_requests_that_the_version_on_trial_fails(
    replica: Replica, loader: ScriptedLoader
) -> None:
    load(replica.pool, trying(1, version(2), share=1.0))
    assert number(ask(replica, generation())) == 2
    loader.engine("2").fails = True
    for stream in (False, True):
        assert number(ask(replica, generation(stream=stream))) == 1
    versions = {report.number: report for report in replica.pool.report().versions}
    assert (versions[2].tried.requests, versions[2].tried.failures) == (3, 2)
    assert (versions[1].tried.requests, versions[1].tried.failures) == (2, 0)
    # A request that names the version gets the failure.
    assert rejection(ask(replica, generation(version=2))).status == 500


def test_the_served_version_answers_requests_that_the_version_on_trial_cannot_start(
    replica: Replica, loader: ScriptedLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example because of a bad chat template. They count as failures."""
    load(replica.pool, trying(1, version(2), share=1.0))

    def fail_to_encode(_: str) -> tuple[int, ...]:
        raise KeyError("content")

    monkeypatch.setattr(loader.engine("2"), "encode", fail_to_encode)
    for stream in (False, True):
        assert number(ask(replica, generation(stream=stream))) == 1
    versions = {report.number: report for report in replica.pool.report().versions}
    assert (versions[2].tried.requests, versions[2].tried.failures) == (2, 2)
    monkeypatch.setattr(loader.engine("1"), "encode", fail_to_encode)
    assert rejection(ask(replica, generation())).status == 500


def test_requests_that_a_version_fails_to_score_count_as_failures(
    replica: Replica, loader: ScriptedLoader
) -> None:
    load(replica.pool, trying(1, version(2), share=1e-9, shadowed=1.0, scored=True))
    loader.engine("2").fails = True

    async def answer() -> None:
        assert number(await collect(replica, generation(affinity="a user"))) == 1
        for _ in range(200):
            if any(report.tried.failures for report in replica.pool.report().versions):
                break
            await asyncio.sleep(0.05)

    asyncio.run(answer())
    versions = {report.number: report for report in replica.pool.report().versions}
    assert (versions[2].tried.requests, versions[2].tried.failures) == (1, 1)
    assert versions[1].tried.failures == 0


def test_the_served_version_answers_requests_for_which_the_version_on_trial_is_too_busy(
    replica: Replica, loader: ScriptedLoader
) -> None:
    load(replica.pool, trying(1, version(2), share=1.0))
    loader.engine("2").full = True
    for stream in (False, True):
        assert number(ask(replica, generation(stream=stream))) == 1
    assert rejection(ask(replica, generation(version=2))).status == 429
    versions = {report.number: report for report in replica.pool.report().versions}
    assert (versions[2].tried.requests, versions[2].tried.refused) == (0, 3)
    loader.engine("1").full = True
    rejected = rejection(ask(replica, generation()))
    assert (rejected.status, rejected.retry_after_seconds) == (429, 7)


def test_requests_that_a_full_engine_rejects_are_not_encoded(
    replica: Replica, loader: ScriptedLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(replica, 1)
    engine = loader.engine("1")
    encode = Mock(side_effect=engine.encode)
    monkeypatch.setattr(engine, "encode", encode)
    engine.full = True
    assert rejection(ask(replica, generation())).status == 429
    encode.assert_not_called()
    engine.full = False
    ask(replica, generation())
    encode.assert_called_once_with(PROMPT)


def test_requests_whose_client_disconnects_are_counted_separately(replica: Replica) -> None:
    serve(replica, 1)

    async def leave(*, whole: bool) -> None:
        stream = replica.generate(generation(max_tokens=3 if whole else 100, stream=True))
        async for _ in stream:
            if not whole:
                break
        await stream.aclose()

    asyncio.run(leave(whole=True))
    asyncio.run(leave(whole=False))
    [report] = replica.pool.report().versions
    assert (report.traffic.requests, report.traffic.departed) == (1, 1)


def test_a_request_for_a_version_that_is_still_loading_is_told_to_retry(
    replica: Replica, loader: ScriptedLoader
) -> None:
    serve(replica, 1)
    loader.gate.clear()
    replica.pool.set_target(line(1, kept=(version(2),)))
    rejected = rejection(ask(replica, generation(version=2)))
    assert (rejected.status, rejected.code) == (503, "model_not_ready")
    assert rejected.retry_after_seconds
    loader.gate.set()
    wait_until_settled(replica.pool)
    assert number(ask(replica, generation(version=2))) == 2


def test_exactly_the_loaded_versions_answer_by_number(replica: Replica) -> None:
    load(replica.pool, line(1, kept=(version(2),)))
    texts = {asked: text(ask(replica, generation(version=asked))) for asked in (1, 2)}
    assert [number(ask(replica, generation(version=asked))) for asked in (1, 2, None)] == [1, 2, 1]
    assert texts[1] != texts[2]
    rejected = rejection(ask(replica, generation(version=3)))
    assert (rejected.status, rejected.code) == (404, "model_not_found")
    assert "loaded versions: 1, 2" in rejected.message
    # A rollback to a loaded version takes effect at once.
    replica.pool.set_target(line(2, kept=(version(1),)))
    assert number(ask(replica, generation())) == 2


def test_a_shadow_version_is_counted_and_scored_but_answers_no_client(replica: Replica) -> None:
    load(replica.pool, trying(1, version(2), shadowed=1.0, scored=True))

    async def answer_five() -> list[int]:
        numbers = [number(await collect(replica, generation())) for _ in range(5)]
        for _ in range(200):
            scored = [report.tried.scored_tokens for report in replica.pool.report().versions]
            if min(scored) >= 5:
                break
            await asyncio.sleep(0.05)
        return numbers

    assert asyncio.run(answer_five()) == [1] * 5
    served, tried = replica.pool.report().versions
    assert served.tried.requests == 5
    assert 1 <= tried.tried.requests <= 5
    assert served.tried.scored_tokens == tried.tried.scored_tokens >= 5
    for report in (served, tried):
        scoring = generation(version=report.number, max_tokens=0, echo=True, num_logprobs=0)
        tokens = [item for item in ask(replica, scoring) if isinstance(item, Token)]
        logprobs = [token.logprob for token in tokens if token.logprob is not None]
        assert report.tried.loss == pytest.approx(-sum(logprobs) / len(logprobs), rel=1e-4)
    assert served.tried.loss != tried.tried.loss


def test_metrics_are_exported_by_model_version_and_replica(replica: Replica) -> None:
    load(replica.pool, line(1, kept=(version(2),)))
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
