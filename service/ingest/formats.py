"""Formats and content encodings of a body, and the limits on its size."""

from dataclasses import dataclass
from email.message import Message
from enum import StrEnum
from pathlib import PurePosixPath

from service.core.errors import UnsupportedMediaType


class DataFormat(StrEnum):
    """Format of a decoded body. The value is what ``format`` is set to in a request."""

    NDJSON = "ndjson"
    """One JSON object per line: ``text``, optional ``id``, ``date``, ``source``; other fields are dropped."""

    TEXT = "text"
    """Documents separated by form feeds; without a form feed, one document."""

    PARQUET = "parquet"
    """A column ``text``, optional ``id``, ``date``, ``source``; other columns are not read."""


class ContentEncoding(StrEnum):
    GZIP = "gzip"
    ZSTD = "zstd"


MEDIA_TYPES = {
    "application/x-ndjson": DataFormat.NDJSON,
    "text/plain": DataFormat.TEXT,
    "application/vnd.apache.parquet": DataFormat.PARQUET,
}
SUFFIXES = {
    ".ndjson": DataFormat.NDJSON,
    ".jsonl": DataFormat.NDJSON,
    ".txt": DataFormat.TEXT,
    ".parquet": DataFormat.PARQUET,
}
ENCODING_SUFFIXES = {".gz": ContentEncoding.GZIP, ".zst": ContentEncoding.ZSTD}


@dataclass(frozen=True)
class Limits:
    """Upload limits. The settings override the first three.

    A body may decode to at most ``max_expansion`` times its own size; the check starts above
    ``expansion_floor_bytes``. Text compresses 3 to 10 times, a decompression bomb at least 1,000 times.
    ``parquet_memory_bytes`` is what the process that reads a Parquet body may allocate; the largest page must
    fit into it.
    """

    max_line_bytes: int = 64 * 2**20
    max_document_bytes: int = 64 * 2**20
    max_decoded_bytes: int = 256 * 2**30
    max_expansion: int = 1000
    expansion_floor_bytes: int = 256 * 2**20
    parquet_memory_bytes: int = 512 * 2**20


def format_of_media_type(content_type: str) -> DataFormat:
    """Format for a ``Content-Type``. Raises UnsupportedMediaType for an unknown one."""
    message = Message()
    message["content-type"] = content_type
    # Not message.get_content_type(), which turns anything malformed into text/plain.
    format = MEDIA_TYPES.get(content_type.partition(";")[0].strip().lower())
    if format is None:
        raise UnsupportedMediaType(f"content type {content_type!r} is not one of {', '.join(MEDIA_TYPES)}")
    charset = str(message.get_param("charset", "utf-8")).lower()
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType(f"charset {charset!r} is not utf-8")
    return format


def encoding_of_header(content_encoding: str | None) -> ContentEncoding | None:
    """Encoding for a ``Content-Encoding``; None for identity. Raises UnsupportedMediaType for others."""
    name = (content_encoding or "identity").strip().lower()
    if name in ("identity", ""):
        return None
    try:
        return ContentEncoding(name.removeprefix("x-"))
    except ValueError:
        raise UnsupportedMediaType(
            f"content encoding {content_encoding!r} is not one of gzip, zstd"
        ) from None


def format_of_path(path: str) -> tuple[DataFormat | None, ContentEncoding | None]:
    """Format and encoding by the suffixes of a file name such as ``news.ndjson.zst``; None if not given."""
    name = PurePosixPath(path)
    encoding = ENCODING_SUFFIXES.get(name.suffix.lower())
    if encoding is not None:
        name = name.with_suffix("")
    return SUFFIXES.get(name.suffix.lower()), encoding
