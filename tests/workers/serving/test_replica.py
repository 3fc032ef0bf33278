import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.artifacts import Artifacts
from tests.support.tiny_export import publish_tiny_export
from workers.serving.engine.transformers_engine import TransformersEngine
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
from workers.serving.replica import Replica

PROMPT = "The cat sat on"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    artifacts = Artifacts(tmp_path_factory.mktemp("artifacts"))
    for number in (1, 2, 3):
        publish_tiny_export(artifacts, f"export/{number}", seed=number)
    publish_tiny_export(artifacts, "export/broken", seed=4, broken=True)
    return artifacts


class Loader:
    """Loads engines, remembers which and whether they live, and waits at a gate when told to."""

    def __init__(self) -> None:
        self.folders: list[str] = []
        self.engines: list[weakref.ref[TransformersEngine]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []

    def __call__(self, folder: Path) -> TransformersEngine:
        self.folders.append(folder.parent.name)
        assert self.gate.wait(30)
        if self.errors:
            raise self.errors.pop(0)
        engine = TransformersEngine(folder)
        self.engines.append(weakref.ref(engine))
        return engine


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def replica(artifacts: Artifacts, loader: Loader) -> Iterator[Replica]:
    replica = Replica("replica-0", artifacts.open, loader)
    yield replica
    replica.close()


def generation(
    prompts: tuple[Prompt, ...] = (PROMPT,), *, n: int = 1, stream: bool = False, **sampling: Any
) -> Generation:
    chosen = Sampling(**{"max_tokens": 10, "temperature": 0.0, **sampling})
    return Generation("line", prompts, chosen, n=n, stream=stream)


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


def serve(replica: Replica, version: int) -> None:
    replica.set_target(version, f"export/{version}")
    assert replica.wait_until_settled(30)


def eventually(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_before_a_release_and_while_loading_it_says_so(replica: Replica, loader: Loader) -> None:
    assert "released" in refusal(ask(replica, generation())).message
    assert refusal(ask(replica, generation())).status == 503
    loader.gate.clear()
    replica.set_target(1, "export/1")
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
        replica.set_target(2, "export/2")
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
    assert eventually(lambda: gc.collect() >= 0 and loader.engines[0]() is None)
    assert loader.engines[1]() is not None


def test_a_stream_keeps_the_version_it_began_with_and_only_then_is_it_freed(
    replica: Replica, loader: Loader
) -> None:
    serve(replica, 1)

    async def stream_over_a_swap() -> list[Answer]:
        stream = replica.generate(generation((PROMPT, "the dog"), n=2, max_tokens=60, stream=True))
        answer = await anext(stream)
        replica.set_target(2, "export/2")
        assert await asyncio.to_thread(replica.wait_until_settled, 30)
        assert number(await collect(replica, generation())) == 2
        assert loader.engines[0]() is not None
        async for batch in stream:
            answer = answer + batch
        return answer

    answer = asyncio.run(stream_over_a_swap())
    assert number(answer) == 1
    assert sum(isinstance(item, Finished) for item in answer) == 4
    assert eventually(lambda: gc.collect() >= 0 and loader.engines[0]() is None)


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_and_is_reported(
    replica: Replica, artifacts: Artifacts
) -> None:
    serve(replica, 1)
    for version, key, reason in (
        (2, "export/broken", "not finite"),
        (3, "export/missing", "ArtifactMissing"),
    ):
        replica.set_target(version, key)
        assert replica.wait_until_settled(30)
        report = replica.report()
        assert report.number == 1
        assert report.failed_number == version
        assert report.error is not None
        assert reason in report.error
        assert number(ask(replica, generation())) == 1
    serve(replica, 2)
    assert replica.report().failed_number is None


def test_a_failed_first_version_answers_503(replica: Replica) -> None:
    replica.set_target(1, "export/missing")
    assert replica.wait_until_settled(30)
    assert refusal(ask(replica, generation())).status == 503
    assert "could not be loaded" in refusal(ask(replica, generation())).message


def test_a_failed_load_is_tried_again(artifacts: Artifacts, loader: Loader) -> None:
    replica = Replica("replica-0", artifacts.open, loader, retry_seconds=0.05)
    loader.errors = [MemoryError("too little"), OSError("store away")]
    replica.set_target(1, "export/1")
    assert eventually(lambda: replica.report().number == 1)
    assert replica.report().error is None
    replica.close()


def test_the_same_target_again_loads_nothing(replica: Replica, loader: Loader) -> None:
    serve(replica, 1)
    serve(replica, 1)
    assert loader.folders == ["1"]


def test_the_latest_target_wins(replica: Replica, loader: Loader) -> None:
    serve(replica, 1)
    loader.gate.clear()
    replica.set_target(2, "export/2")
    assert eventually(lambda: loader.folders == ["1", "2"])
    replica.set_target(3, "export/3")
    loader.gate.set()
    assert replica.wait_until_settled(30)
    assert replica.report().number == 3
    assert loader.folders == ["1", "2", "3"]


def test_back_to_the_version_that_answers_while_another_loads(replica: Replica, loader: Loader) -> None:
    serve(replica, 1)
    loader.gate.clear()
    replica.set_target(2, "export/2")
    assert eventually(lambda: loader.folders == ["1", "2"])
    replica.set_target(1, "export/1")
    assert replica.wait_until_settled(0)
    loader.gate.set()
    assert eventually(lambda: len(loader.engines) == 2 and loader.engines[1]() is None)
    assert number(ask(replica, generation())) == 1


def test_no_target_any_more_means_no_answer(replica: Replica) -> None:
    serve(replica, 1)
    replica.set_target(None, None)
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
    assert eventually(lambda: gc.collect() >= 0 and loader.engines[0]() is None)


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
