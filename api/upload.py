"""Bodies of data, sent or named, into the sink that checks, hashes and stores them."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Generic, NamedTuple, TypeVar

from fastapi import Request
from pydantic import ValidationError

from api.deps import Services, in_thread
from api.schemas.data import Source
from service.core.errors import InvalidRequest, PathswitchError, Unavailable, UnsupportedMediaType
from service.ingest.formats import (
    MEDIA_TYPES,
    ContentEncoding,
    DataFormat,
    Limits,
    encoding_of_header,
    format_of_media_type,
    format_of_path,
)
from service.ingest.ingest import Body, Ingest
from service.ingest.sources import open_uri
from service.ingest.stream import in_worker, receive
from service.operations.models import error_items
from service.settings import Settings

Named = TypeVar("Named", bound=Source)
_T = TypeVar("_T")

_JSON = "application/json"
_MAX_SOURCE_BYTES = 1 << 16

# Up to here a body is read first, and worked on in one hop to a thread instead of six.
_SMALL_BYTES = 1 << 16


class Received(NamedTuple, Generic[Named]):
    """A body that was read to its end and is good; ``source`` where it was named instead of sent."""

    ingest: Ingest
    body: Body
    source: Named | None


@asynccontextmanager
async def received(request: Request, services: Services, kind: type[Named]) -> AsyncIterator[Received[Named]]:
    """Take in the body of ``request``. What was not published at the end of the block is removed.

    ``kind`` is what a JSON body may say. Raises BadContent, UnsupportedMediaType, InvalidRequest, or
    Unavailable while too many others wait to be taken in.
    """
    async with services.uploads.turn():
        source = await _source(request, kind)
        format, encoding = _format_of(request) if source is None else _format_of_source(source)
        limits = limits_of(services.settings)
        ingest = await in_worker(
            lambda: Ingest(services.artifacts, format, encoding, limits), services.uploads.threads
        )
        try:
            if source is None:
                body = await receive(request.stream(), ingest, services.uploads.threads)
            else:
                uri = source.uri
                body = await in_worker(lambda: _read(uri, services, ingest), services.uploads.threads)
            yield Received(ingest, body, source)
        finally:
            await in_worker(ingest.close, services.uploads.threads)


async def registered(
    request: Request,
    services: Services,
    kind: type[Named],
    check: Callable[[], None],
    register: Callable[[Received[Named]], _T],
) -> _T:
    """``check`` before the body of ``request`` is taken in, as ``received`` does, and ``register`` after. Both may block."""
    if not _is_small(request):
        await in_thread(check)
        async with received(request, services, kind) as taken_in:
            return await in_worker(lambda: register(taken_in), services.uploads.threads)
    raw = await request.body()  # before its turn, which must not wait for whoever sends nothing
    async with services.small_uploads.turn():

        def at_once() -> _T:
            try:
                format, encoding = _format_of(request)
                limits = limits_of(services.settings)
                with Ingest(services.artifacts, format, encoding, limits, small=True) as ingest:
                    ingest.feed(raw)
                    return register(Received(ingest, ingest.end(), None))
            except PathswitchError:
                check()  # what it finds goes before flaws of the body, as for bodies that are large
                raise

        return await in_worker(at_once, services.small_uploads.threads)


def _is_small(request: Request) -> bool:
    """Whether the data is in the body, and the body says that it is small. What is compressed may be of any size."""
    length = request.headers.get("content-length", "")
    if "content-encoding" in request.headers or _media_type(request) == _JSON:
        return False
    return length.isdecimal() and int(length) <= _SMALL_BYTES


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def limits_of(settings: Settings) -> Limits:
    return Limits(
        max_line_bytes=settings.max_line_bytes,
        max_document_bytes=settings.max_document_bytes,
        max_decoded_bytes=settings.max_decoded_bytes,
    )


def openapi_body(kind: type[Source]) -> dict[str, Any]:
    """How OpenAPI describes such a body, which FastAPI does not read."""
    content: dict[str, Any] = {
        name: {"schema": {"type": "string", "format": "binary"}} for name in MEDIA_TYPES
    }
    content[_JSON] = {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}
    return {"requestBody": {"required": True, "content": content}}


async def _source(request: Request, kind: type[Named]) -> Named | None:
    """The JSON body, where it is one."""
    if _media_type(request) != _JSON:
        return None
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > _MAX_SOURCE_BYTES:
            raise InvalidRequest(f"a JSON body names the data, in at most {_MAX_SOURCE_BYTES} bytes")
    try:
        return kind.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise InvalidRequest("not a JSON body that names data", error_items(error)) from error


def _format_of(request: Request) -> tuple[DataFormat, ContentEncoding | None]:
    try:
        format = format_of_media_type(request.headers.get("content-type", ""))
    except UnsupportedMediaType as error:
        raise UnsupportedMediaType(f"{error.detail}, or {_JSON}") from error
    return format, encoding_of_header(request.headers.get("content-encoding"))


def _format_of_source(source: Source) -> tuple[DataFormat, ContentEncoding | None]:
    format, encoding = format_of_path(source.uri)
    if source.format is not None:
        format = source.format
    if format is None:
        raise InvalidRequest(f"the name {source.uri!r} does not tell its format: say which")
    return format, encoding


def _read(uri: str, services: Services, ingest: Ingest) -> Body:
    for chunk in open_uri(uri, services.settings.import_roots):
        if services.cut_off.is_set():  # no cancellation reaches a thread
            raise Unavailable("the service is stopping")
        ingest.feed(chunk)
    return ingest.end()
