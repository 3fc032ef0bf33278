"""The demo's load generator counts every failure and every answer that mixes versions."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from deploy.demo.traffic import AnswerError, LoadGenerator, MixedAnswer, Tally, complete, version_of

Script = Callable[[dict[str, object]], tuple[int, str, bytes]]
"""Maps the body of a request to the status, version header and body of the answer."""


def whole(fingerprint: str) -> bytes:
    return json.dumps({"system_fingerprint": fingerprint, "choices": [{"text": "some text"}]}).encode()


def stream(*fingerprints: str, end: str = "data: [DONE]\n\n") -> bytes:
    events = [f"data: {whole(fingerprint).decode()}\n\n" for fingerprint in fingerprints]
    return ("".join(events) + end).encode()


@pytest.fixture
def answering() -> Iterator[Callable[[Script], str]]:
    """A function that starts a scripted server and returns its URL."""
    servers: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(script: Script) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, version, content = script(body)
                self.send_response(status)
                self.send_header("x-pathswitch-version", version)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def traffic_until(url: str, num_requests: int) -> Tally:
    traffic = LoadGenerator(url, "m", num_threads=2)
    traffic.start()
    while traffic.requests < num_requests:
        threading.Event().wait(0.01)
    return traffic.stop()


def test_whole_and_streamed_answers_are_counted_by_version(answering: Callable[[Script], str]) -> None:
    url = answering(
        lambda body: (200, "2", stream("m@2", "m@2")) if body["stream"] else (200, "1", whole("m@1"))
    )
    tally = traffic_until(url, 4)
    assert set(tally.answered) == {1, 2}
    assert tally.streamed == tally.answered[2]
    assert (tally.failed, tally.mixed) == (0, 0)
    assert len(tally.latencies) == tally.requests


@pytest.mark.parametrize(
    ("status", "content"),
    [
        (503, b'{"error": {"message": "being loaded"}}'),
        (200, stream("m@1", end="")),
        (200, stream("m@1", end='data: {"error": {"message": "lost"}}\n\n')),
    ],
    ids=["refused", "broken off", "error in the stream"],
)
def test_every_failure_is_counted(answering: Callable[[Script], str], status: int, content: bytes) -> None:
    url = answering(lambda body: (status, "1", content))
    with httpx.Client(trust_env=False) as client, pytest.raises(AnswerError):
        complete(client, url, "m", "Return", stream=True)


def test_an_unreachable_server_is_a_failure() -> None:
    tally = traffic_until("http://127.0.0.1:9/v1", 2)
    assert tally.failed >= 2
    assert "ConnectError" in tally.failures[0]


@pytest.mark.parametrize(
    ("header", "fingerprints"),
    [("1", ["m@1", "m@2"]), ("2", ["m@1"]), (None, ["m@1"]), ("1", []), ("1", ["other@1"])],
)
def test_an_answer_must_name_one_version(header: str | None, fingerprints: list[str]) -> None:
    chunks = [{"system_fingerprint": fingerprint} for fingerprint in fingerprints]
    with pytest.raises(MixedAnswer):
        version_of("m", header, chunks)
    assert version_of("m", "3", [{"system_fingerprint": "m@3"}] * 2) == 3


def test_quantiles_of_the_latencies() -> None:
    tally = Tally(latencies=[0.4, 0.1, 0.3, 0.2])
    assert [tally.latency(q) for q in (0.0, 0.5, 1.0)] == [0.1, 0.3, 0.4]
    assert Tally().latency(0.5) is None
