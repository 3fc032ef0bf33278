"""Bodies named by a URI: chunks of a file under the import roots, or of an S3 object."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from service.artifacts.object_store import ObjectStore
from service.core.errors import InvalidRequest
from service.ingest.import_roots import resolve_under_roots

_CHUNK_BYTES = 1 << 20


def open_uri(uri: str, import_roots: Sequence[Path]) -> Iterator[bytes]:
    """Chunks of an ``s3://bucket/key``, or of a ``file://`` under an import root after following links.

    Raises InvalidRequest at once for anything else; its message does not reveal whether a file outside the
    roots exists. The first chunk raises InvalidRequest for a missing object, and Unavailable if the store
    is not responding. Question marks and hashes in a name must be percent-encoded.
    """
    try:
        parts = urlsplit(uri)
        path = unquote(parts.path, errors="strict")
    except ValueError:
        raise InvalidRequest(f"{uri!r} is not a URI") from None
    if parts.scheme == "s3":
        if not parts.netloc or not path.strip("/") or parts.query or parts.fragment:
            raise InvalidRequest(f"{uri!r} does not have the form s3://bucket/key")
        return _object_chunks(uri, parts.netloc, path.lstrip("/"))
    if parts.scheme != "file":
        raise InvalidRequest(
            f"{uri!r}: only s3:// URIs, and file:// URIs under the import roots, can be read"
        )
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not path.startswith("/"):
        raise InvalidRequest(f"{uri!r} does not have the form file:///path")
    if not import_roots:
        raise InvalidRequest("no file can be read: PATHSWITCH_IMPORT_ROOTS is not set")
    resolved = resolve_under_roots(path, import_roots)
    if resolved is None or not resolved.is_file():
        raise _not_under_roots(uri)
    return _chunks(uri, resolved)


def _chunks(uri: str, path: Path) -> Iterator[bytes]:
    # The path is resolved. Don't follow a link, or block on a pipe, that has replaced the file since.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        raise _not_under_roots(uri) from None
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _not_under_roots(uri)
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _object_chunks(uri: str, bucket: str, key: str) -> Iterator[bytes]:
    chunks = ObjectStore(f"s3://{bucket}").chunks(key)
    if chunks is None:
        raise InvalidRequest(f"{uri!r} does not exist")
    yield from chunks


def _not_under_roots(uri: str) -> InvalidRequest:
    return InvalidRequest(f"{uri!r} is not a readable file under the import roots")
