"""Events over HTTP: in pages, and as a stream that loses nothing."""

import json
import threading
from collections.abc import Iterator

import httpx
import pytest

from api.client import Client
from tests.support.control_plane import ControlPlane

STREAM = {"Accept": "text/event-stream"}


def events_of(response: httpx.Response) -> Iterator[dict[str, str]]:
    """The fields of each event in a stream; events without data are skipped."""
    fields: dict[str, str] = {}
    for line in response.iter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
            continue
        if "data" in fields:
            yield fields
        fields = {}


def latest(plane: ControlPlane) -> str:
    return list(plane.client.events())[-1].id


def test_events_are_paged_in_order(each_plane: ControlPlane, name: str) -> None:
    each_plane.client.create_dataset(f"{name}-before")
    after = latest(each_plane)
    each_plane.add_dataset(name, [f"{name} a", "b"])
    each_plane.client.create_model({"name": name, "dataset": name})
    page = each_plane.http.get("/events", params={"after": after, "limit": 2}).json()
    assert [event["type"] for event in page["data"]] == ["dataset.created", "data_version.created"]
    assert page["has_more"] is True
    first = page["data"][0]
    assert set(first) == {"id", "type", "data", "created_at"}
    assert first["data"] == {"dataset": name}
    assert first["created_at"].endswith("Z")
    rest = each_plane.http.get("/events", params={"after": page["data"][-1]["id"]}).json()
    assert [event["type"] for event in rest["data"]] == ["model.created", "update.created"]
    assert rest["has_more"] is False
    assert each_plane.http.get("/events", params={"after": "latest"}).json()["data"] == []


@pytest.mark.parametrize("after", ["ev_1", "-1", "", "1.5", "9" * 30])
def test_an_invalid_event_id_is_refused(plane: ControlPlane, after: str) -> None:
    assert plane.http.get("/events", params={"after": after}).status_code == 422
    assert plane.http.get("/events", headers=STREAM | {"Last-Event-ID": "x"}).status_code == 422


def test_a_stream_delivers_events_as_they_happen(each_plane: ControlPlane, name: str) -> None:
    with each_plane.http.stream("GET", "/events", params={"after": "latest"}, headers=STREAM) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = events_of(response)
        each_plane.client.create_dataset(name)
        event = next(events)
    assert event["event"] == "dataset.created"
    data = json.loads(event["data"])
    assert (data["id"], data["data"]) == (event["id"], {"dataset": name})


def test_a_broken_stream_resumes_where_it_broke(each_plane: ControlPlane, name: str) -> None:
    after = latest(each_plane) if list(each_plane.client.events()) else "0"
    for letter in "abc":
        each_plane.client.create_dataset(f"{name}-{letter}")
    with each_plane.http.stream("GET", "/events", params={"after": after}, headers=STREAM) as response:
        events = events_of(response)
        seen = [next(events), next(events)]
    each_plane.client.create_dataset(f"{name}-d")
    # A browser reconnects to the same URL and sends the id of the last event.
    headers = STREAM | {"Last-Event-ID": seen[-1]["id"]}
    with each_plane.http.stream("GET", "/events", params={"after": after}, headers=headers) as response:
        events = events_of(response)
        seen += [next(events), next(events)]
    datasets = [json.loads(event["data"])["data"]["dataset"] for event in seen]
    assert datasets == [f"{name}-{letter}" for letter in "abcd"]


def test_a_stream_can_be_resumed_before_its_first_event(plane: ControlPlane, name: str) -> None:
    with plane.http.stream("GET", "/events", params={"after": "latest"}, headers=STREAM) as response:
        first_id = next(line for line in response.iter_lines() if line.startswith("id: "))
    plane.client.create_dataset(name)
    headers = STREAM | {"Last-Event-ID": first_id.removeprefix("id: ")}
    with plane.http.stream("GET", "/events", params={"after": "latest"}, headers=headers) as response:
        assert json.loads(next(events_of(response))["data"])["data"] == {"dataset": name}


def test_no_event_is_lost_with_concurrent_writers(each_plane: ControlPlane, name: str) -> None:
    writers, each = 4, 10
    expected = {f"{name}-{writer}-{number}" for writer in range(writers) for number in range(each)}

    def write(writer: int) -> None:
        with Client(each_plane.url) as client:
            for number in range(each):
                client.create_dataset(f"{name}-{writer}-{number}")

    with each_plane.http.stream("GET", "/events", params={"after": "latest"}, headers=STREAM) as response:
        events = events_of(response)
        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(writers)]
        for thread in threads:
            thread.start()
        seen = [next(events) for _ in expected]
        for thread in threads:
            thread.join()
    assert {json.loads(event["data"])["data"]["dataset"] for event in seen} == expected
    ids = [int(event["id"]) for event in seen]
    assert ids == sorted(ids)


def test_the_client_follows_events(plane: ControlPlane, name: str) -> None:
    after = latest(plane)
    plane.client.create_dataset(name)
    with Client(plane.url) as client:
        event = next(client.follow(after))
    assert (event.type, event.data) == ("dataset.created", {"dataset": name})
    assert [event.data for event in plane.client.events(after)] == [{"dataset": name}]
