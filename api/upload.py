"""Receives the body of an upload, sent or named by a URI, into the sink that checks, hashes and stores it."""

from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from fastapi import Request
from pydantic import ValidationError

from api.deps import Services
from api.schemas.data import Source
from service.core.errors import InvalidRequest, Unavailable, UnsupportedMediaType
from service.core.manifest import SMALL_BYTES
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

SourceT = TypeVar("SourceT", bound=Source)

_JSON = "application/json"
_MAX_SOURCE_BYTES = 1 << 16


class Received(NamedTuple, Generic[SourceT]):
    """A complete, valid body. ``source`` is set if a JSON body named the data. Work on it in ``threads``."""

    ingest: Ingest
    body: Body
    source: SourceT | None
    threads: Executor


@asynccontextmanager
async def receive_upload(
    request: Request, services: Services, source_type: type[SourceT]
) -> AsyncIterator[Received[SourceT]]:
    """Receive the body of ``request``; at the end of the block, delete what was not published.

    ``source_type`` is the schema of a JSON body. Raises BadContent, UnsupportedMediaType, InvalidRequest, or
    Unavailable if too many uploads wait for a slot.
    """
    small = _is_small(request)
    pool = services.small_uploads if small else services.uploads
    if small:
        await request.body()  # before taking a slot, which a client that sends nothing must not hold
    async with pool.slot():
        source = await _read_source(request, source_type)
        format, encoding = _format_of_request(request) if source is None else _format_of_source(source)
        limits = _limits(services.settings)
        ingest = await in_worker(
            partial(Ingest, services.artifacts, format, encoding, limits, small=small), pool.threads
        )
        try:
            if source is None:
                body = await receive(request.stream(), ingest, pool.threads)
            else:
                body = await in_worker(partial(_receive_uri, source.uri, services, ingest), pool.threads)
            yield Received(ingest, body, source, pool.threads)
        finally:
            await in_worker(ingest.close, pool.threads)


def openapi_body(source_type: type[Source]) -> dict[str, Any]:
    """OpenAPI description of an upload's body, which FastAPI does not read."""
    content: dict[str, Any] = {
        name: {"schema": {"type": "string", "format": "binary"}} for name in MEDIA_TYPES
    }
    content[_JSON] = {"schema": {"$ref": f"#/components/schemas/{source_type.__name__}"}}
    return {"requestBody": {"required": True, "content": content}}


def _is_small(request: Request) -> bool:
    """Whether the body is data of at most SMALL_BYTES. A compressed body may decode to any size."""
    length = request.headers.get("content-length", "")
    if "content-encoding" in request.headers or _media_type(request) == _JSON:
        return False
    return length.isdecimal() and int(length) <= SMALL_BYTES


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _limits(settings: Settings) -> Limits:
    return Limits(
        max_line_bytes=settings.max_line_bytes,
        max_document_bytes=settings.max_document_bytes,
        max_decoded_bytes=settings.max_decoded_bytes,
    )


async def _read_source(request: Request, source_type: type[SourceT]) -> SourceT | None:
    """The JSON body that names the data; None if the body is the data itself."""
    if _media_type(request) != _JSON:
        return None
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > _MAX_SOURCE_BYTES:
            raise InvalidRequest(
                f"the JSON body is over {_MAX_SOURCE_BYTES} bytes: it must name the data, not contain it"
            )
    try:
        return source_type.model_validate_json(bytes(raw))
    except ValidationError as error:
        raise InvalidRequest("the JSON body does not name data", error_items(error)) from error


def _format_of_request(request: Request) -> tuple[DataFormat, ContentEncoding | None]:
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
        raise InvalidRequest(f"the format of {source.uri!r} is unknown from its suffix: set `format`")
    return format, encoding


def _receive_uri(uri: str, services: Services, ingest: Ingest) -> Body:
    for chunk in open_uri(uri, services.settings.import_roots):
        if services.cut_off.is_set():  # a thread cannot be cancelled
            raise Unavailable("the service is stopping")
        ingest.feed(chunk)
    return ingest.end()
