"""How the ingress finds a replica that answers, with scripted handles in place of Serve's."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from service.core.serving import ReplicaReport, Residence, VersionReport
from workers.serving.generation import (
    AnswerItem,
    Finished,
    FinishReason,
    Generation,
    RejectionError,
    RequestRejected,
    Sampling,
    Started,
    not_ready,
    unknown_version,
)
from workers.serving.ray import directory as ray_directory
from workers.serving.ray.directory import PINNED_ATTEMPTS, RayDirectory

READY = ReplicaReport("line-1", 1, (VersionReport(2, Residence.READY),))
FAILED = ReplicaReport("line-1", 1, (VersionReport(2, Residence.FAILED, "no room"),))
ANSWER: list[AnswerItem] = [Started(2, 1), Finished(0, FinishReason.STOP, "", 0)]


class Response:
    """The response to one call: batches, and errors to raise between them."""

    def __init__(self, items: list[list[AnswerItem] | Exception]) -> None:
        self._items = items
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[list[AnswerItem]]:
        for item in self._items:
            if isinstance(item, Exception):
                raise item
            yield item

    def cancel(self) -> None:
        self.cancelled = True
        if isinstance(self._items[0], BackPressureError | DeploymentUnavailableError):
            raise self._items[0]  # as Serve does for a call that could not be made


class Handle:
    """Answers each call with the next script, and every further call with the last one."""

    def __init__(
        self, *scripts: list[list[AnswerItem] | Exception], reports: tuple[ReplicaReport, ...] = ()
    ) -> None:
        self._reports = reports
        self.responses: list[Response] = []
        self._scripts = scripts

    def remote(self, _: Generation) -> Response:
        self.responses.append(Response(self._scripts[min(len(self.responses), len(self._scripts) - 1)]))
        return self.responses[-1]

    def running_replicas_populated(self) -> bool:
        return True

    def broadcast(self, method: str) -> Any:
        assert method == "report"
        return SimpleNamespace(results=lambda **_: list(self._reports))


def ask(handle: Any, *, version: int | None = None, sleeps: bool = False) -> list[AnswerItem]:
    directory = RayDirectory(lambda model: handle)
    directory.update({"line": {"released": True, "proven": True, "sleeps": sleeps, "load_seconds": 0.1}})
    request = Generation("line", ("a",), Sampling(max_tokens=1), version=version)

    async def collect() -> list[AnswerItem]:
        return [item async for batch in directory.generate(request) for item in batch]

    return asyncio.run(collect())


def rejected(rejection: Callable[..., RejectionError], *args: Any) -> list[list[AnswerItem] | Exception]:
    return [[rejection(*args).rejection]]


@pytest.mark.parametrize(
    "rejection", [rejected(unknown_version, "line", 2, [1]), rejected(not_ready, "soon")]
)
def test_a_version_that_one_replica_has_not_loaded_is_asked_of_others(
    rejection: list[list[AnswerItem] | Exception],
) -> None:
    handle = Handle(rejection, rejection, [ANSWER])
    assert ask(handle, version=2) == ANSWER
    assert [response.cancelled for response in handle.responses] == [True] * 3
    nowhere = Handle(rejection, reports=(ReplicaReport("line-0", 1), FAILED))
    assert ask(nowhere, version=2) == rejection[0]
    assert len(nowhere.responses) == PINNED_ATTEMPTS
    assert _status(ask(Handle(rejection, reports=(ReplicaReport("line-0", 1), READY)), version=2)) == 503
    unpinned = Handle(rejection)
    assert ask(unpinned) == rejection[0]
    assert len(unpinned.responses) == 1


def test_a_request_whose_replica_dies_goes_to_another_unless_its_answer_has_started() -> None:
    assert ask(Handle([RayActorError()], [RayActorError()], [ANSWER])) == ANSWER
    assert _status(ask(Handle([RayActorError()]))) == 500
    started = Handle([ANSWER[:1], RayActorError()])
    assert _status(ask(started)) == 500
    assert len(started.responses) == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BackPressureError(num_queued_requests=256, max_queued_requests=256), 429),
        (DeploymentUnavailableError(DeploymentID("ModelReplica", "model-line")), 503),
    ],
)
def test_calls_that_serve_rejects_are_answered_with_a_status_and_a_retry_delay(
    error: Exception, status: int
) -> None:
    [answer] = ask(Handle([error]))
    assert isinstance(answer, RequestRejected)
    assert answer.status == status
    assert answer.retry_after_seconds


def test_an_unexpected_error_becomes_a_rejection() -> None:
    scripts: list[list[list[AnswerItem] | Exception]] = [
        [ANSWER[:1], KeyError("gRPC")],
        [KeyError("gRPC")],
    ]
    for script in scripts:
        answer = ask(Handle(script))
        assert _status(answer) == 500
        assert isinstance(answer[-1], RequestRejected)
        assert "KeyError" in answer[-1].message


def test_a_request_to_a_model_that_does_not_wake_up_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_directory, "WAKE_SECONDS", 0.0)

    class Sleeping(Handle):
        def options(self, **_: Any) -> Any:
            return self

        def remote(self, *_: Any) -> Any:
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            return future

    [answer] = ask(Sleeping(), sleeps=True)
    assert isinstance(answer, RequestRejected)
    assert (answer.status, answer.retry_after_seconds) == (503, 5)


def _status(answer: list[AnswerItem]) -> int:
    assert isinstance(answer[-1], RequestRejected)
    return answer[-1].status
