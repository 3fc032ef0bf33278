"""HTTP transport of the client: requests, retries, paging, uploads, event streams and errors."""

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

Row = TypeVar("Row", bound=BaseModel)

_PAGE_SIZE = 100
_CHUNK_BYTES = 1 << 18
_CONTENT_TYPES = {format: content_type for content_type, format in MEDIA_TYPES.items()}

# The server answers an upload after it has hashed, split and synced it: minutes for hundreds of gigabytes.
_UPLOAD_TIMEOUT = httpx.Timeout(30.0, read=3600.0, write=300.0)
_STREAM_TIMEOUT = httpx.Timeout(30.0, read=60.0)  # an idle event stream sends a comment every 15 s
_RECONNECT_SECONDS = 1.0
_RETRY_PAUSES = (0.5, 2.0)  # seconds before each retry of a POST whose answer was lost

ProgressCallback = Callable[[int], None]
"""Called with the number of bytes sent since the last call."""


class ApiError(Exception):
    """The control plane answered with an error. ``problem`` is its RFC 9457 document."""

    def __init__(self, problem: Problem, retry_after: float | None = None) -> None:
        super().__init__(f"{problem.title}: {problem.detail}")
        self.problem = problem
        self.retry_after = retry_after


class UploadResult(NamedTuple, Generic[Row]):
    """The row of an upload. ``created`` is False if the content already existed."""

    row: Row
    created: bool


class HttpTransport:
    """An httpx client that follows the control plane's conventions."""

    def __init__(self, url: str, timeout: float) -> None:
        self._http = httpx.Client(base_url=url, timeout=timeout)

    def close(self) -> None:
        self._http.close()

    def request(
        self, method: str, path: str, model: type[Row], *, base: str = BASE, json: Any = None, **query: Any
    ) -> Row:
        """Send one request and parse the answer. Query parameters that are None are left out.

        A POST whose answer is lost is sent again with the same idempotency key, so that it runs only once.
        """
        headers = {IDEMPOTENCY_KEY: uuid.uuid4().hex} if method == "POST" else {}
        request = self._http.build_request(
            method, base + path, params=without_none(query), json=json, headers=headers
        )
        response = self._send_with_retries(request) if method == "POST" else self._http.send(request)
        raise_for_problem(response)
        return model.model_validate_json(response.content)

    def paginate(self, path: str, model: type[Row], after: str | None = None) -> Iterator[Row]:
        """Yield the items of a list, page by page."""
        has_more = True
        while has_more:
            page = self.request("GET", path, Page[Any], limit=_PAGE_SIZE, after=after)
            yield from (model.model_validate(item) for item in page.data)
            has_more = page.has_more
            after = page.data[-1]["id"] if page.data else after

    def upload(
        self,
        path: str,
        model: type[Row],
        source: Path | Iterable[bytes],
        format: DataFormat | None,
        encoding: ContentEncoding | None,
        progress: ProgressCallback | None,
        **query: Any,
    ) -> UploadResult[Row]:
        """Stream a file or chunks of bytes.

        A file's suffixes give the format and encoding if they are None.
        """
        headers = {}
        if isinstance(source, Path):
            file_format, file_encoding = format_of_path(source.name)
            format, encoding = format or file_format, encoding or file_encoding
            headers["Content-Length"] = str(source.stat().st_size)
        if format is None:
            name = source.name if isinstance(source, Path) else "a stream"
            raise InvalidRequest(
                f"cannot tell the format of {name}: give it as one of {', '.join(DataFormat)}"
            )
        headers["Content-Type"] = _CONTENT_TYPES[format]
        if encoding is not None:
            headers["Content-Encoding"] = encoding
        response = self._http.post(
            BASE + path,
            params=without_none(query),
            headers=headers,
            content=_report_progress(source, progress),
            timeout=_UPLOAD_TIMEOUT,
        )
        return _upload_result(model, response)

    def upload_from_uri(self, path: str, model: type[Row], body: Mapping[str, Any]) -> UploadResult[Row]:
        """Have the service itself read the data that ``body`` names."""
        response = self._http.post(BASE + path, json=body, timeout=_UPLOAD_TIMEOUT)
        return _upload_result(model, response)

    def download(self, path: str, target: Path) -> None:
        with self._http.stream("GET", BASE + path) as response:
            raise_for_problem(response)
            with target.open("wb") as output:
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    output.write(chunk)

    def stream_events(self, path: str, after: str) -> Iterator[Event]:
        """Yield server-sent events forever.

        Reconnects after interruptions, once a first connection succeeded.
        """
        connected = False
        headers = {"Accept": "text/event-stream"}
        while True:
            try:
                with self._http.stream(
                    "GET", BASE + path, params={"after": after}, headers=headers, timeout=_STREAM_TIMEOUT
                ) as response:
                    raise_for_problem(response)
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

    def _send_with_retries(self, request: httpx.Request) -> httpx.Response:
        for pause in _RETRY_PAUSES:
            try:
                return self._http.send(request)
            except (httpx.ReadError, httpx.RemoteProtocolError, httpx.ReadTimeout):
                time.sleep(pause)
        return self._http.send(request)


def url_path(*parts: str | int) -> str:
    return "".join(f"/{quote(str(part), safe='')}" for part in parts)


def without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def raise_for_problem(response: httpx.Response) -> None:
    """Raise ApiError unless the response is a success. Errors of proxies have no problem document."""
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


def _upload_result(model: type[Row], response: httpx.Response) -> UploadResult[Row]:
    raise_for_problem(response)
    created = response.status_code == httpx.codes.CREATED
    return UploadResult(model.model_validate_json(response.content), created)


def _report_progress(source: Path | Iterable[bytes], progress: ProgressCallback | None) -> Iterator[bytes]:
    for chunk in _read_chunks(source) if isinstance(source, Path) else source:
        yield chunk
        if progress is not None:
            progress(len(chunk))


def _read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
