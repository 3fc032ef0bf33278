"""What a body may be: its format, its content encoding, and how large its parts may get."""

from dataclasses import dataclass
from email.message import Message
from enum import StrEnum
from pathlib import PurePosixPath

from service.core.errors import UnsupportedMediaType


class DataFormat(StrEnum):
    """How documents lie in a decoded body; the value is the word that ``format`` takes in a request."""

    NDJSON = "ndjson"
    """One JSON object a line: ``text``, and optional ``id``, ``date``, ``source``; others are dropped."""

    TEXT = "text"
    """Documents separated by a form feed or, without any, one document."""

    PARQUET = "parquet"
    """A column ``text``, and optional ``id``, ``date``, ``source``; other columns are not read."""


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
    """What one body may ask of the service. All in bytes but ``max_expansion``.

    ``max_expansion`` is how many times its own size a body may decode to, looked at once that is over
    ``expansion_floor_bytes``: text compresses 3 to 10 times, and no bomb worth the name less than 1,000.
    ``parquet_memory_bytes`` is what the process that reads a Parquet body may allocate: its largest page must
    fit.
    """

    max_line_bytes: int = 16 * 2**20
    max_document_bytes: int = 8 * 2**20
    max_decoded_bytes: int = 64 * 2**30
    max_expansion: int = 1000
    expansion_floor_bytes: int = 256 * 2**20
    parquet_memory_bytes: int = 512 * 2**20


def format_of_media_type(content_type: str) -> DataFormat:
    """Format of a body by its ``Content-Type``. Raises UnsupportedMediaType for others."""
    message = Message()
    message["content-type"] = content_type
    # Not message.get_content_type(), for which whatever is malformed is text/plain.
    format = MEDIA_TYPES.get(content_type.partition(";")[0].strip().lower())
    if format is None:
        raise UnsupportedMediaType(f"content type {content_type!r} is not one of {', '.join(MEDIA_TYPES)}")
    charset = str(message.get_param("charset", "utf-8")).lower()
    if charset not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType(f"charset {charset!r} is not utf-8")
    return format


def encoding_of_header(content_encoding: str | None) -> ContentEncoding | None:
    """Encoding by ``Content-Encoding``; None for identity. Raises UnsupportedMediaType for others."""
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
    """Format and encoding of a file by its suffixes, as in ``news.ndjson.zst``; None where there is none."""
    name = PurePosixPath(path)
    encoding = ENCODING_SUFFIXES.get(name.suffix.lower())
    if encoding is not None:
        name = name.with_suffix("")
    return SUFFIXES.get(name.suffix.lower()), encoding
