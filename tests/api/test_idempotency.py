"""POSTs with an Idempotency-Key are carried out once, even if their answers or their process are lost."""

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.client import HTTPConnection, HTTPResponse
from urllib.parse import urlsplit

import httpx
import pytest

from api import idempotency as middleware
from api.client import Client
from service.store import idempotency
from service.store.database import now
from service.store.idempotency import KeyState
from service.store.tables import IdempotentRequest
from tests.api.test_uploads_at_once import all_at_once
from tests.support.control_plane import ControlPlane, ndjson

BY_SOCKET = pytest.mark.no_database_faults("uses a raw socket, which does not retry")

NDJSON = {"Content-Type": "application/x-ndjson"}


@pytest.fixture
def key() -> str:
    return uuid.uuid4().hex


def create(plane: ControlPlane, name: str, key: str, **more: object) -> httpx.Response:
    return plane.http.post("/datasets", json={"name": name} | more, headers={"Idempotency-Key": key})


def push(plane: ControlPlane, dataset: str, key: str, *texts: str) -> httpx.Response:
    headers = NDJSON | {"Idempotency-Key": key}
    return plane.http.post(f"/datasets/{dataset}/versions", content=ndjson(*texts), headers=headers)


def row_of(plane: ControlPlane, key: str) -> IdempotentRequest | None:
    with plane.database.reading() as session:
        return session.get(IdempotentRequest, key)


def change(plane: ControlPlane, key: str, make: Callable[[IdempotentRequest], None]) -> None:
    with plane.database.transaction() as session:
        make(session.get_one(IdempotentRequest, key))


def claim_as_dead_process(plane: ControlPlane, key: str, target: str, *, carried_out: bool) -> None:
    with plane.database.transaction() as session:
        assert idempotency.claim(session, key, target, "dead").state == KeyState.OURS
        if carried_out:
            idempotency.mark_carried_out(session, key, "dead")
        row = session.get_one(IdempotentRequest, key)
        row.lease_until = now(session) - timedelta(seconds=1)


# --- the same answer ---


def test_a_repeated_request_gets_the_first_answer(each_plane: ControlPlane, name: str, key: str) -> None:
    first = create(each_plane, name, key)
    again = create(each_plane, name, key)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.content == first.content
    assert again.headers["Content-Type"] == first.headers["Content-Type"]
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert create(each_plane, name, uuid.uuid4().hex).status_code == 409


def test_an_update_is_created_once(each_plane: ControlPlane, name: str, key: str) -> None:
    each_plane.add_dataset(name, [f"{name} a", "b"])
    each_plane.client.create_model({"name": name, "dataset": name, "auto_update": False})
    headers = {"Idempotency-Key": key}
    answers = [each_plane.http.post(f"/models/{name}/updates", json={}, headers=headers) for _ in range(3)]
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(list(each_plane.client.updates(name))) == 1
    # The update has finished meanwhile; the answer is still the first one.
    each_plane.finish(name)
    assert each_plane.http.post(f"/models/{name}/updates", json={}, headers=headers).text == answers[0].text


def test_a_refusal_is_kept_too(plane: ControlPlane, name: str, key: str) -> None:
    create(plane, name, uuid.uuid4().hex)
    refused = create(plane, name, key)
    assert refused.status_code == 409
    assert create(plane, name, key).content == refused.content
    assert refused.headers["Content-Type"] == "application/problem+json"


def test_a_repeated_body_is_only_hashed(each_plane: ControlPlane, name: str, key: str) -> None:
    each_plane.add_dataset(name)
    first = push(each_plane, name, key, f"{name} a", "b")
    again = push(each_plane, name, key, f"{name} a", "b")
    assert (first.status_code, again.status_code) == (201, 201)  # without a key the second is a 200
    assert again.content == first.content
    assert push(each_plane, name, key, f"{name} a", "c").json()["code"] == "idempotency_key_reused"
    assert len(list(each_plane.client.data_versions(name))) == 1


def test_a_request_without_a_body_can_have_a_key(plane: ControlPlane, name: str, key: str) -> None:
    plane.add_dataset(name, [f"{name} a", "b"])
    plane.client.create_model({"name": name, "dataset": name})
    [update] = plane.client.updates(name)
    headers = {"Idempotency-Key": key}
    first = plane.http.post(f"/updates/{update.id}/cancel", headers=headers)
    assert (first.status_code, first.json()["state"]) == (200, "cancelled")
    assert plane.http.post(f"/updates/{update.id}/cancel", headers=headers).content == first.content


# --- another request ---


def test_a_key_belongs_to_one_path_and_one_body(each_plane: ControlPlane, name: str, key: str) -> None:
    create(each_plane, name, key)
    other = create(each_plane, f"{name}-other", key)
    elsewhere = each_plane.http.post(
        "/models", json={"name": name, "dataset": name}, headers={"Idempotency-Key": key}
    )
    for answer in (other, elsewhere):
        assert answer.status_code == 422
        assert answer.json()["code"] == "idempotency_key_reused"
    assert each_plane.http.get(f"/datasets/{name}-other").status_code == 404


@pytest.mark.parametrize("bad", ["", "k" * 256, "schl\u00fcssel".encode("latin-1"), "a\tb"])
def test_an_invalid_key_is_refused(plane: ControlPlane, name: str, bad: str | bytes) -> None:
    answer = plane.http.post("/datasets", json={"name": name}, headers={"Idempotency-Key": bad})
    assert answer.status_code == 422
    assert plane.http.get(f"/datasets/{name}").status_code == 404


def test_a_key_is_ignored_except_on_post(plane: ControlPlane, name: str, key: str) -> None:
    create(plane, name, uuid.uuid4().hex)
    headers = {"Idempotency-Key": key}
    assert plane.http.get(f"/datasets/{name}", headers=headers).status_code == 200
    assert row_of(plane, key) is None


# --- at once ---


def test_100_concurrent_requests_create_one_row_and_get_one_answer(
    each_plane: ControlPlane, name: str, key: str
) -> None:
    answers = all_at_once(100, lambda _: create(each_plane, name, key))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("Idempotency-Replayed" not in answer.headers for answer in answers) == 1
    assert sum(row.name == name for row in each_plane.client.datasets()) == 1


@contextmanager
def half_sent(plane: ControlPlane, path: str, key: str, body: bytes) -> Iterator[Callable[[], HTTPResponse]]:
    """Send half of a request, and give a function that sends the rest and returns the response."""
    address = urlsplit(plane.url)
    assert address.hostname is not None
    connection = HTTPConnection(address.hostname, address.port, timeout=60)
    connection.putrequest("POST", "/api/v1" + path)
    for name, value in (NDJSON | {"Idempotency-Key": key, "Content-Length": str(len(body))}).items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(body[: len(body) // 2])

    def finish() -> HTTPResponse:
        connection.send(body[len(body) // 2 :])
        return connection.getresponse()

    try:
        yield finish
    finally:
        connection.close()


def wait_until_claimed(plane: ControlPlane, key: str) -> IdempotentRequest:
    deadline = time.monotonic() + 30
    while (row := row_of(plane, key)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return row


@BY_SOCKET
def test_a_concurrent_request_waits_for_the_first_answer(
    each_plane: ControlPlane, name: str, key: str
) -> None:
    each_plane.add_dataset(name)
    answers: list[httpx.Response] = []
    waiting = threading.Thread(target=lambda: answers.append(push(each_plane, name, key, f"{name} a", "b")))
    with half_sent(each_plane, f"/datasets/{name}/versions", key, ndjson(f"{name} a", "b")) as finish:
        wait_until_claimed(each_plane, key)
        waiting.start()
        time.sleep(0.3)
        assert not answers
        first = finish()
        assert (first.status, json.loads(first.read())["number"]) == (201, 1)
    waiting.join()
    assert (answers[0].status_code, answers[0].json()["number"]) == (201, 1)
    assert answers[0].headers["Idempotency-Replayed"] == "true"


@BY_SOCKET
def test_a_request_that_waits_too_long_is_told_to_retry(
    plane: ControlPlane, name: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "WAIT_SECONDS", 0.2)
    plane.add_dataset(name)
    with half_sent(plane, f"/datasets/{name}/versions", key, ndjson(f"{name} a", "b")) as finish:
        wait_until_claimed(plane, key)
        answer = push(plane, name, key, f"{name} a", "b")
        assert (answer.status_code, answer.json()["code"]) == (409, "in_flight")
        assert answer.headers["Retry-After"] == "1"
        assert finish().status == 201
    assert push(plane, name, key, f"{name} a", "b").status_code == 201


@BY_SOCKET
def test_a_long_request_keeps_its_lease(
    plane: ControlPlane, name: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "LEASE", timedelta(seconds=0.6))
    plane.add_dataset(name)
    with half_sent(plane, f"/datasets/{name}/versions", key, ndjson(f"{name} a", "b")) as finish:
        before = wait_until_claimed(plane, key)
        time.sleep(1.5)
        after = row_of(plane, key)
        assert after is not None
        assert (after.owner, after.lease_until > before.lease_until) == (before.owner, True)
        assert finish().status == 201


# --- what fails ---


@BY_SOCKET
def test_an_interrupted_upload_frees_its_key(each_plane: ControlPlane, name: str, key: str) -> None:
    each_plane.add_dataset(name)
    with half_sent(each_plane, f"/datasets/{name}/versions", key, ndjson(f"{name} a", "b")):
        wait_until_claimed(each_plane, key)
    deadline = time.monotonic() + 30
    while row_of(each_plane, key) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert push(each_plane, name, key, f"{name} a", "b").status_code == 201


def test_a_refusal_before_the_body_is_read_is_not_kept(plane: ControlPlane, name: str, key: str) -> None:
    """The route looks up the dataset before it reads the body."""
    body = ndjson(*(f"{name} {number}" for number in range(20_000)))
    headers = NDJSON | {"Idempotency-Key": key}
    assert plane.http.post(f"/datasets/{name}/versions", content=body, headers=headers).status_code == 404
    plane.add_dataset(name)
    assert plane.http.post(f"/datasets/{name}/versions", content=body, headers=headers).status_code == 201


def test_a_body_that_is_too_large_is_refused_with_a_new_and_with_a_used_key(
    plane: ControlPlane, name: str, key: str
) -> None:
    create(plane, name, key)
    large = {"description": "x" * (1 << 21)}
    assert create(plane, name, key, **large).status_code == 413
    assert create(plane, f"{name}-other", uuid.uuid4().hex, **large).status_code == 413


@pytest.mark.parametrize("carried_out", [False, True])
def test_a_request_whose_process_died_is_carried_out_once(
    each_plane: ControlPlane, name: str, key: str, carried_out: bool
) -> None:
    claim_as_dead_process(each_plane, key, "POST /api/v1/datasets", carried_out=carried_out)
    answer = create(each_plane, name, key)
    if carried_out:
        assert (answer.status_code, answer.json()["code"]) == (409, "answer_lost")
        assert each_plane.http.get(f"/datasets/{name}").status_code == 404
    else:
        assert answer.status_code == 201


@BY_SOCKET
def test_a_stalled_request_that_was_taken_over_changes_nothing(
    each_plane: ControlPlane, name: str, key: str
) -> None:
    """A request stalls after half of its body, another one claims the key, then the first one continues."""
    each_plane.add_dataset(name)
    path = f"/datasets/{name}/versions"
    with half_sent(each_plane, path, key, ndjson(f"{name} a", "b")) as finish:
        wait_until_claimed(each_plane, key)

        def expire(row: IdempotentRequest) -> None:
            row.lease_until = row.created_at - timedelta(seconds=1)

        change(each_plane, key, expire)
        assert push(each_plane, name, key, f"{name} c", "d").status_code == 201
        late = finish()
        assert (late.status, json.loads(late.read())["code"]) == (409, "conflict")
    [version] = each_plane.client.data_versions(name)
    assert version.documents == 2
    row = row_of(each_plane, key)
    assert row is not None
    assert (row.status, row.carried_out) == (201, True)


def test_an_answer_is_kept_for_a_day(each_plane: ControlPlane, name: str, key: str) -> None:
    create(each_plane, name, key)

    def age(hours: float) -> None:
        def make_older(row: IdempotentRequest) -> None:
            row.created_at -= timedelta(hours=hours)

        change(each_plane, key, make_older)

    age(23.9)
    assert create(each_plane, name, key).status_code == 201
    age(0.2)
    assert create(each_plane, name, key).status_code == 409  # a new request: the name is taken
    old = uuid.uuid4().hex
    create(each_plane, f"{name}-old", old)
    change(each_plane, old, lambda row: setattr(row, "created_at", row.created_at - timedelta(days=2)))
    create(each_plane, f"{name}-new", uuid.uuid4().hex)
    assert row_of(each_plane, old) is None


# --- the client ---


@BY_SOCKET
def test_the_client_repeats_a_post_whose_answer_was_lost(plane: ControlPlane, name: str) -> None:
    """Through a proxy that forwards the first request and drops its answer."""
    address = urlsplit(plane.url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        seen: list[bytes] = []

        def pass_on() -> None:
            for drop in (True, False):
                client, _ = listener.accept()
                with client, socket.create_connection((address.hostname, address.port)) as upstream:
                    request = client.recv(1 << 16)
                    while b"\r\n\r\n" not in request or not request.rstrip().endswith(b"}"):
                        request += client.recv(1 << 16)
                    seen.append(request)
                    upstream.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                    answer = b""
                    while more := upstream.recv(1 << 16):
                        answer += more
                    if not drop:
                        client.sendall(answer)

        proxy = threading.Thread(target=pass_on)
        proxy.start()
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            assert client.create_dataset(name).name == name
        proxy.join()
    keys = {line for request in seen for line in request.splitlines() if b"dempotency" in line}
    assert (len(seen), len(keys)) == (2, 1)
