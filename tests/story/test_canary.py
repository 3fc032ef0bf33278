"""New versions of a line that is rolled out by canary, trained and served for real, while its users go on asking."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from openai import OpenAI

from service.core.states import ReleaseState, UpdateState
from tests.story.conftest import NewPlane, Workers
from tests.support.story import DATASET, DOCUMENTS, SPEC, push_and_release
from tests.support.training import texts_of
from tests.support.waiting import until

pytestmark = [pytest.mark.guard, pytest.mark.slow_on_postgres]

USERS = 16
PROMPT = "1 a 2 b 3 c 1 a 2 b 3 c"
CANARY = {
    "strategy": "canary",
    "share": 0.5,
    "seconds": 1,
    "min_requests": 30,
    "max_latency_ratio": None,  # a machine that trains meanwhile says nothing about latency
    "max_loss_increase": 5,
}


def test_a_version_stands_its_canary_before_it_takes_over_and_a_worse_one_never_does(
    new_plane: NewPlane, workers: Workers
) -> None:
    plane = new_plane()
    executor, serving = workers(plane)
    plane.client.create_model(SPEC | {"serving": {"rollout": CANARY}})
    push_and_release(plane, 1, executor, serving)
    with users_of(serving.url()) as answers:
        second = push_and_release(plane, 2, executor, serving)
        plane.client.change_model("m", {"serving": {"rollout": {"max_loss_increase": -5}}})
        plane.push(DATASET, *texts_of(3, DOCUMENTS)).raise_for_status()
        plane.finish("m", executor, serving)
        plane.finish("m", executor, serving)  # the tick after: replicas hear that it was given up
        until(lambda: {version for _, version in answers[-USERS:]} == {"m@2"})

    first_release, stood, failed = plane.client.releases("m")
    assert first_release.trial is None, "nothing was served that it could have been compared with"
    assert (second.number, stood.state) == (2, ReleaseState.LIVE)
    assert stood.trial is not None
    assert stood.trial.tried.requests >= CANARY["min_requests"]
    assert (stood.trial.tried.failures, stood.trial.served.failures) == (0, 0)
    assert stood.trial.tried.loss is not None
    assert stood.trial.tried.loss != stood.trial.served.loss
    assert (failed.version, failed.state) == (3, ReleaseState.FAILED)
    assert failed.error is not None
    assert "nats per token on shadowed prompts" in failed.error
    newest = max(plane.client.updates("m"), key=lambda update: update.data_version)
    assert newest.state == UpdateState.FAILED
    assert plane.client.model("m").state.served_version == 2

    versions = [version for _, version in answers]
    assert versions.index("m@2") < len(versions) - versions[::-1].index("m@1"), "both answered at once"
    for user in range(USERS):
        own = [version for asked_by, version in answers if asked_by == user]
        changes = [version for version, _ in itertools.groupby(own)]
        assert changes in (["m@1", "m@2"], ["m@1", "m@2", "m@3", "m@2"])
    assert "m@3" in versions


@contextmanager
def users_of(url: str) -> Iterator[list[tuple[int, str | None]]]:
    """Users who ask in turn, without pause: who was answered, and by which version."""
    answers: list[tuple[int, str | None]] = []
    failures: list[Exception] = []
    stopping = threading.Event()

    def ask() -> None:
        with OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            for user in itertools.cycle(range(USERS)):
                if stopping.is_set():
                    return
                answer = client.completions.create(
                    model="m", prompt=PROMPT, max_tokens=2, user=f"user-{user}"
                )
                answers.append((user, answer.system_fingerprint))

    def ask_until_stopped() -> None:
        try:
            ask()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=ask_until_stopped)
    thread.start()
    try:
        yield answers
    finally:
        stopping.set()
        thread.join()
    assert not failures
