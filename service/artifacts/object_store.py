"""A prefix of an S3 bucket: reads and writes whole objects, and creates small ones only if they do not exist.

Credentials, region and endpoint come from the environment, as AWS's own tools read them (``AWS_ACCESS_KEY_ID``,
``AWS_REGION``, ``AWS_ENDPOINT_URL``, ``AWS_ALLOW_HTTP`` …). Server errors, throttling and lost connections are retried
for RETRY_SECONDS; then the call raises Unavailable.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store

from service.artifacts.layout import StoredFile
from service.core.errors import Unavailable

# Longer than most stores take to restart, shorter than a caller's own timeout.
RETRY_SECONDS = 20.0
_CHUNK_BYTES = 8 << 20


class ObjectStore:
    """Objects below ``url``, ``s3://bucket/prefix``; paths are relative to it.

    Connects on first use, so that it can be pickled for another process.
    """

    def __init__(self, url: str, retry_seconds: float | None = None) -> None:
        self.url = url.rstrip("/")
        self._retry_seconds = RETRY_SECONDS if retry_seconds is None else retry_seconds

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_store"}

    @cached_property
    def _store(self) -> S3Store:
        return S3Store.from_url(
            self.url,
            retry_config={
                "max_retries": 1000,
                "backoff": {
                    "init_backoff": timedelta(seconds=0.1),
                    "max_backoff": timedelta(seconds=5),
                    "base": 2,
                },
                "retry_timeout": timedelta(seconds=self._retry_seconds),
            },
        )

    def read(self, path: str) -> bytes | None:
        """The content of a small object, or None if it does not exist."""
        with self._translating_errors(path):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError:
                return None

    def create(self, path: str, content: bytes) -> bool:
        """Create a small object. Returns False if it exists, perhaps from this call's own write after a lost response."""
        with self._translating_errors(path):
            try:
                obstore.put(self._store, path, content, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

    def upload(self, path: str, file: Path) -> None:
        """Upload a file, a large one in parts. The object appears once all of it is uploaded."""
        with self._translating_errors(path):
            obstore.put(self._store, path, file, chunk_size=_CHUNK_BYTES)

    def chunks(self, path: str) -> Iterator[bytes] | None:
        """The content of an object in chunks, or None if it does not exist."""
        with self._translating_errors(path):
            try:
                response = obstore.get(self._store, path)
            except FileNotFoundError:
                return None
        return self._stream(path, response)

    def _stream(self, path: str, response: "obstore.GetResult") -> Iterator[bytes]:
        with self._translating_errors(path):
            for chunk in response.stream(min_chunk_size=_CHUNK_BYTES):
                yield bytes(chunk)

    def paths(self, prefix: str) -> Iterator[str]:
        """The paths of all objects below ``prefix``."""
        yield from (item["path"] for item in self._list(prefix))

    def files(self) -> Iterator[StoredFile]:
        """Every object; ``modified`` is the time it was written."""
        for item in self._list(None):
            yield StoredFile(item["path"], item["size"], item["last_modified"].timestamp())

    def _list(self, prefix: str | None) -> Iterator["obstore.ObjectMeta"]:
        with self._translating_errors(prefix or ""):
            for page in obstore.list(self._store, prefix):
                yield from page

    def delete(self, paths: list[str]) -> None:
        """Delete objects. Ignores missing paths."""
        if paths:
            with self._translating_errors(paths[0]):
                obstore.delete(self._store, paths)

    def check(self) -> None:
        """Raise Unavailable unless the store is writable."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.create(probe, b"")
        self.delete([probe])

    @contextmanager
    def _translating_errors(self, path: str) -> Iterator[None]:
        try:
            yield
        except BaseError as error:
            summary = str(error).partition("\n")[0]
            raise Unavailable(f"{self.url}/{path}: {summary}") from error
