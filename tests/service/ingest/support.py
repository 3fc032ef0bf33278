"""Bodies to ingest, and short ways to ingest them."""

import gzip
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from service.artifacts import Artifacts, LocalArtifacts
from service.core.errors import BadContent, ErrorItem
from service.ingest.documents import Document
from service.ingest.formats import ContentEncoding, DataFormat, Limits
from service.ingest.ingest import Ingest, Ingested

NDJSON, TEXT, PARQUET = DataFormat.NDJSON, DataFormat.TEXT, DataFormat.PARQUET
GZIP, ZSTD = ContentEncoding.GZIP, ContentEncoding.ZSTD

ENCODERS: dict[ContentEncoding | None, Callable[[bytes], bytes]] = {
    None: bytes,
    GZIP: gzip.compress,
    ZSTD: zstandard.compress,
}


def ndjson(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def as_row(document: Document) -> dict[str, str]:
    return {name: value for name, value in document._asdict().items() if value is not None}


def in_chunks(body: bytes, size: int) -> Iterable[bytes]:
    return (body[start : start + size] for start in range(0, len(body), size))


def publish(
    artifacts: Artifacts,
    body: bytes | Iterable[bytes],
    format: DataFormat = NDJSON,
    encoding: ContentEncoding | None = None,
    *,
    earlier: Sequence[Path] = (),
    uploaded: Sequence[Path] = (),
    fraction: float = 0.0,
) -> Ingested:
    """Ingest a body as a data version."""
    with Ingest(artifacts, format, encoding) as ingest:
        for chunk in [body] if isinstance(body, bytes) else body:
            ingest.feed(chunk)
        ingest.end()
        return ingest.publish_version(earlier, uploaded, fraction)


def publish_slice(artifacts: Artifacts, body: bytes) -> Ingested:
    """Ingest a body as an uploaded evaluation set."""
    with Ingest(artifacts, NDJSON) as ingest:
        ingest.feed(body)
        ingest.end()
        return ingest.publish_slice()


def row_errors(
    directory: Path,
    body: bytes,
    format: DataFormat = NDJSON,
    encoding: ContentEncoding | None = None,
    limits: Limits | None = None,
    chunk_bytes: int = 1 << 16,
) -> list[ErrorItem]:
    """Errors of a body; empty for a good one. Fails if anything is left on disk."""
    found: list[ErrorItem] = []
    try:
        with Ingest(LocalArtifacts(directory), format, encoding, limits or Limits()) as ingest:
            for chunk in in_chunks(body, chunk_bytes):
                ingest.feed(chunk)
            ingest.end()
    except BadContent as error:
        found = list(error.errors)
        assert found
    assert list(directory.rglob("*")) == []
    return found


def folder(artifacts: Artifacts, ingested: Ingested) -> Path:
    return artifacts.open(ingested.manifest.key)
