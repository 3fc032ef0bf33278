"""How the ingress finds a replica that answers, with handles that play what Serve's do."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from service.core.serving import ReplicaReport, Residence, VersionReport
from workers.serving import ray_apps
from workers.serving.generation import (
    Answer,
    Finished,
    FinishReason,
    Generation,
    Refused,
    Sampling,
    Started,
    not_ready,
    unknown_version,
)
from workers.serving.ray_apps import PINNED_ATTEMPTS, _RayDirectory

READY = ReplicaReport("line-1", 1, (VersionReport(2, Residence.READY),))
FAILED = ReplicaReport("line-1", 1, (VersionReport(2, Residence.FAILED, "no room"),))
ANSWER: list[Answer] = [Started(2, 1), Finished(0, FinishReason.STOP, "", 0)]


class Response:
    """Of one call: batches, or an error in their place."""

    def __init__(self, items: list[list[Answer] | Exception]) -> None:
        self._items = items
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[list[Answer]]:
        for item in self._items:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        self.cancelled = True
        if isinstance(self._items[0], BackPressureError | DeploymentUnavailableError):
            raise self._items[0]  # as Serve does for a call that could not be made


class Handle:
    """Answers each call by the next of ``plays``, the last of them again and again."""

    def __init__(
        self, *plays: list[list[Answer] | Exception], reports: tuple[ReplicaReport, ...] = ()
    ) -> None:
        self._reports = reports
        self.responses: list[Response] = []
        self._plays = plays

    def remote(self, _: Generation) -> Response:
        self.responses.append(Response(self._plays[min(len(self.responses), len(self._plays) - 1)]))
        return self.responses[-1]

    def running_replicas_populated(self) -> bool:
        return True

    def broadcast(self, method: str) -> Any:
        assert method == "report"
        return SimpleNamespace(results=lambda **_: list(self._reports))


def ask(handle: Any, *, version: int | None = None, sleeps: bool = False) -> list[Answer]:
    directory = _RayDirectory()
    directory._models = {"line": {"released": True, "proven": True, "sleeps": sleeps, "load_seconds": 0.1}}
    directory._handles = {"line": handle}
    request = Generation("line", ("a",), Sampling(max_tokens=1), version=version)

    async def collect() -> list[Answer]:
        return [item async for batch in directory.generate(request) for item in batch]

    return asyncio.run(collect())


def refused(refusal: Callable[..., Any], *args: Any) -> list[list[Answer] | Exception]:
    return [[refusal(*args).refused]]


@pytest.mark.parametrize("refusal", [refused(unknown_version, "line", 2, [1]), refused(not_ready, "soon")])
def test_a_version_that_one_replica_does_not_hold_another_may(
    refusal: list[list[Answer] | Exception],
) -> None:
    handle = Handle(refusal, refusal, [ANSWER])
    assert ask(handle, version=2) == ANSWER
    assert [response.cancelled for response in handle.responses] == [True] * 3
    nowhere = Handle(refusal, reports=(ReplicaReport("line-0", 1), FAILED))
    assert ask(nowhere, version=2) == refusal[0]
    assert len(nowhere.responses) == PINNED_ATTEMPTS
    assert _status(ask(Handle(refusal, reports=(ReplicaReport("line-0", 1), READY)), version=2)) == 503
    unpinned = Handle(refusal)
    assert ask(unpinned) == refusal[0]
    assert len(unpinned.responses) == 1


def test_a_request_whose_replica_dies_is_asked_of_another_unless_it_has_begun() -> None:
    assert ask(Handle([RayActorError()], [RayActorError()], [ANSWER])) == ANSWER
    assert _status(ask(Handle([RayActorError()]))) == 500
    begun = Handle([ANSWER[:1], RayActorError()])
    assert _status(ask(begun)) == 500
    assert len(begun.responses) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BackPressureError(num_queued_requests=256, max_queued_requests=256), 429),
        (DeploymentUnavailableError(DeploymentID("ModelReplica", "model-line")), 503),
    ],
)
def test_who_could_not_even_be_asked_is_said(error: Exception, status: int) -> None:
    [answer] = ask(Handle([error]))
    assert isinstance(answer, Refused)
    assert answer.status == status
    assert answer.retry_after_seconds


def test_whatever_breaks_ends_in_words() -> None:
    for play in ([ANSWER[:1], KeyError("gRPC")], [KeyError("gRPC")]):
        answer = ask(Handle(play))
        assert _status(answer) == 500
        assert isinstance(answer[-1], Refused)
        assert "KeyError" in answer[-1].message


def test_a_model_that_sleeps_and_does_not_wake_is_not_waited_for_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_apps, "WAKE_SECONDS", 0.0)

    class Sleeping(Handle):
        def options(self, **_: Any) -> Any:
            return self

        def remote(self, *_: Any) -> Any:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            return future

    [answer] = ask(Sleeping(), sleeps=True)
    assert isinstance(answer, Refused)
    assert (answer.status, answer.retry_after_seconds) == (503, 5)


def _status(answer: list[Answer]) -> int:
    assert isinstance(answer[-1], Refused)
    return answer[-1].status
