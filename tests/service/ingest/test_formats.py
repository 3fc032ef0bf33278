"""Format and encoding of a body by its headers or its name."""

import pytest

from service.core.errors import UnsupportedMediaType
from service.ingest.formats import (
    ContentEncoding,
    DataFormat,
    encoding_of_header,
    format_of_media_type,
    format_of_path,
)


@pytest.mark.parametrize(
    ("content_type", "format"),
    [
        ("application/x-ndjson", DataFormat.NDJSON),
        ("Application/X-NDJSON; charset=UTF-8", DataFormat.NDJSON),
        ("text/plain", DataFormat.TEXT),
        ('text/plain; charset="us-ascii"', DataFormat.TEXT),
        ("application/vnd.apache.parquet", DataFormat.PARQUET),
    ],
)
def test_media_types(content_type: str, format: DataFormat) -> None:
    assert format_of_media_type(content_type) is format


@pytest.mark.parametrize("content_type", ["", "text/html", "nonsense", "text/plain; charset=latin-1"])
def test_other_media_types_are_refused(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        format_of_media_type(content_type)


def test_content_encodings() -> None:
    assert encoding_of_header(None) is None
    assert encoding_of_header(" identity ") is None
    assert encoding_of_header("GZIP") is ContentEncoding.GZIP
    assert encoding_of_header("x-gzip") is ContentEncoding.GZIP
    assert encoding_of_header("zstd") is ContentEncoding.ZSTD
    for other in ("br", "gzip, zstd", "deflate"):
        with pytest.raises(UnsupportedMediaType):
            encoding_of_header(other)


def test_file_names() -> None:
    assert format_of_path("/a/b.jsonl.gz") == (DataFormat.NDJSON, ContentEncoding.GZIP)
    assert format_of_path("b.NDJSON.zst") == (DataFormat.NDJSON, ContentEncoding.ZSTD)
    assert format_of_path("b.txt") == (DataFormat.TEXT, None)
    assert format_of_path("b.parquet") == (DataFormat.PARQUET, None)
    assert format_of_path("b.gz") == (None, ContentEncoding.GZIP)
    assert format_of_path("b") == (None, None)
