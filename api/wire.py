"""HTTP under the client: requests sent, answers parsed, lists paged, bodies streamed, errors raised."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel

from api.schemas.common import BASE, IDEMPOTENCY_KEY, Page, Problem
from api.schemas.events import Event
from service.core.errors import InvalidRequest
from service.ingest.formats import MEDIA_TYPES, ContentEncoding, DataFormat, format_of_path

Answer = TypeVar("Answer", bound=BaseModel)

_PAGE = 100
_CHUNK_BYTES = 1 << 18
_CONTENT_TYPES = {format: content_type for content_type, format in MEDIA_TYPES.items()}

# A body is only answered when it is all hashed, divided and synced: minutes for hundreds of gigabytes.
_UPLOAD_TIMEOUT = httpx.Timeout(30.0, read=3600.0, write=300.0)
_STREAM_TIMEOUT = httpx.Timeout(30.0, read=60.0)  # a quiet stream says that it lives every 15 s
_RECONNECT_SECONDS = 1.0
_LOST_ANSWER_PAUSES = (0.5, 2.0)  # seconds before each further try

Progress = Callable[[int], None]
"""Called with the number of bytes that were sent since the last call."""


class ApiError(Exception):
    """The control plane said no. ``problem`` is its RFC 9457 document."""

    def __init__(self, problem: Problem, retry_after: float | None = None) -> None:
        super().__init__(f"{problem.title}: {problem.detail}")
        self.problem = problem
        self.retry_after = retry_after


class Pushed(NamedTuple, Generic[Answer]):
    """What an upload came to. Not ``created``: the same content was there already, and this is its row."""

    row: Answer
    created: bool


class Wire:
    def __init__(self, url: str, timeout: float) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout)

    def close(self) -> None:
        self._http.close()

    def ask(
        self, method: str, path: str, kind: type[Answer], *, base: str = BASE, json: Any = None, **query: Any
    ) -> Answer:
        """One request, one answer. Of ``query``, what is None is left out.

        A POST whose answer got lost on its way is sent again, under a key by which it is carried out once.
        """
        headers = {IDEMPOTENCY_KEY: uuid.uuid4().hex} if method == "POST" else {}
        request = self._http.build_request(
            method, base + path, params=given(query), json=json, headers=headers
        )
        response = self._send_again(request) if method == "POST" else self._http.send(request)
        raise_for(response)
        return kind.model_validate_json(response.content)

    def _send_again(self, request: httpx.Request) -> httpx.Response:
        """Send it until it is answered, a few times at most."""
        for pause in _LOST_ANSWER_PAUSES:
            try:
                return self._http.send(request)
            except (httpx.ReadError, httpx.RemoteProtocolError, httpx.ReadTimeout):
                time.sleep(pause)
        return self._http.send(request)

    def every(self, path: str, kind: type[Answer], after: str | None = None) -> Iterator[Answer]:
        """The items of a list, page by page."""
        more = True
        while more:
            page = self.ask("GET", path, Page[Any], limit=_PAGE, after=after)
            yield from (kind.model_validate(item) for item in page.data)
            more = page.has_more
            after = page.data[-1]["id"] if page.data else after

    def push(
        self,
        path: str,
        kind: type[Answer],
        source: Path | Iterable[bytes],
        format: DataFormat | None,
        encoding: ContentEncoding | None,
        progress: Progress | None,
        **query: Any,
    ) -> Pushed[Answer]:
        """Stream a file, whose suffixes tell what is not told, or chunks of bytes."""
        headers = {}
        if isinstance(source, Path):
            told_format, told_encoding = format_of_path(source.name)
            format, encoding = format or told_format, encoding or told_encoding
            headers["Content-Length"] = str(source.stat().st_size)
        if format is None:
            raise InvalidRequest("the name does not tell which format the data has: say which")
        headers["Content-Type"] = _CONTENT_TYPES[format]
        if encoding is not None:
            headers["Content-Encoding"] = encoding
        response = self._http.post(
            BASE + path,
            params=given(query),
            headers=headers,
            content=_counted(source, progress),
            timeout=_UPLOAD_TIMEOUT,
        )
        return _pushed(kind, response)

    def push_uri(
        self, path: str, kind: type[Answer], body: Mapping[str, Any], **query: Any
    ) -> Pushed[Answer]:
        """Have the service read a body by itself."""
        response = self._http.post(BASE + path, params=given(query), json=body, timeout=_UPLOAD_TIMEOUT)
        return _pushed(kind, response)

    def download(self, path: str, target: Path) -> None:
        with self._http.stream("GET", BASE + path) as response:
            raise_for(response)
            with target.open("wb") as output:
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    output.write(chunk)

    def follow(self, path: str, after: str) -> Iterator[Event]:
        """Server-sent events without end, resumed after every interruption once it was connected."""
        connected = False
        headers = {"Accept": "text/event-stream"}
        while True:
            try:
                with self._http.stream(
                    "GET", BASE + path, params={"after": after}, headers=headers, timeout=_STREAM_TIMEOUT
                ) as response:
                    raise_for(response)
                    connected = True
                    for line in response.iter_lines():
                        name, _, value = line.partition(": ")
                        if name == "id":
                            after = value
                        elif name == "data":
                            yield Event.model_validate_json(value)
            except httpx.TransportError:
                if not connected:
                    raise
            time.sleep(_RECONNECT_SECONDS)


def url_path(*parts: str | int) -> str:
    return "".join(f"/{quote(str(part), safe='')}" for part in parts)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def raise_for(response: httpx.Response) -> None:
    """Raise ApiError for an answer that is not success, also where it is not one of ours (a proxy's, say)."""
    if response.is_success:
        return
    response.read()
    try:
        problem = Problem.model_validate_json(response.content)
    except ValueError:
        problem = Problem(
            type="about:blank",
            title=response.reason_phrase,
            status=response.status_code,
            detail=response.text[:1000],
            code="http_error",
        )
    seconds = response.headers.get("Retry-After", "")
    raise ApiError(problem, float(seconds) if seconds.isdigit() else None)


def _pushed(kind: type[Answer], response: httpx.Response) -> Pushed[Answer]:
    raise_for(response)
    created = response.status_code == httpx.codes.CREATED
    return Pushed(kind.model_validate_json(response.content), created)


def _counted(source: Path | Iterable[bytes], progress: Progress | None) -> Iterator[bytes]:
    for chunk in _read(source) if isinstance(source, Path) else source:
        yield chunk
        if progress is not None:
            progress(len(chunk))


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
