"""Canary rollouts of really trained versions while users send requests."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
CANARY: dict[str, Any] = {
    "strategy": "canary",
    "share": 0.5,
    "seconds": 1,
    "min_requests": 30,
    "max_latency_ratio": None,  # this machine trains at the same time, so its latency means nothing
    "max_loss_increase": 5,
}


def test_a_canary_is_promoted_if_it_passes_and_withdrawn_if_it_is_worse(
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
        plane.finish("m", executor, serving)  # one more tick withdraws the canary from the replicas
        until(lambda: {version for _, version in answers[-USERS:]} == {"m@2"})

    first_release, promoted, failed = plane.client.releases("m")
    assert first_release.trial is None, "there was no served version to compare it with"
    assert (second.number, promoted.state) == (2, ReleaseState.LIVE)
    assert promoted.trial is not None
    assert promoted.trial.tried.requests >= CANARY["min_requests"]
    assert (promoted.trial.tried.failures, promoted.trial.served.failures) == (0, 0)
    assert promoted.trial.tried.loss is not None
    assert promoted.trial.tried.loss != promoted.trial.served.loss
    assert (failed.version, failed.state) == (3, ReleaseState.FAILED)
    assert failed.error is not None
    assert "nats per token on shadowed prompts" in failed.error
    newest = max(plane.client.updates("m"), key=lambda update: update.data_version)
    assert newest.state == UpdateState.FAILED
    assert plane.client.model("m").state.served_version == 2

    versions = [version for _, version in answers]
    assert versions.index("m@2") < len(versions) - versions[::-1].index("m@1"), (
        "both versions answered at the same time"
    )
    for user in range(USERS):
        own = [version for asker, version in answers if asker == user]
        changes = [version for version, _ in itertools.groupby(own)]
        assert changes in (["m@1", "m@2"], ["m@1", "m@2", "m@3", "m@2"])
    assert "m@3" in versions


@contextmanager
def users_of(url: str) -> Iterator[list[tuple[int, str | None]]]:
    """Users who take turns and send requests without pause. Yields the growing list of (user, version)."""
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
