"""A prefix of an S3 bucket: whole objects in and out, and one write that only succeeds where nothing is.

Credentials, region and endpoint come from the environment, as AWS's own tools read them (``AWS_ACCESS_KEY_ID``,
``AWS_REGION``, ``AWS_ENDPOINT_URL``, ``AWS_ALLOW_HTTP`` …). 5xx, SlowDown and lost connections are tried again for a
while; what does not answer then is Unavailable.
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

from service.core.errors import Unavailable

# Longer than a restart of most stores, shorter than what anybody who waits for an answer would wait.
RETRY_SECONDS = 20.0
_CHUNK_BYTES = 8 << 20


class ObjectStore:
    """``url``: ``s3://bucket/prefix``. Paths are relative to it. Connects on first use, and goes to other processes by URL."""

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
        """All of a small object; None where there is none."""
        with self._answering(path):
            try:
                return bytes(obstore.get(self._store, path).bytes())
            except FileNotFoundError:
                return None

    def create(self, path: str, content: bytes) -> bool:
        """Write a small object where none is. False where one is, be it that an answer was lost and it is ours."""
        with self._answering(path):
            try:
                obstore.put(self._store, path, content, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

    def upload(self, path: str, file: Path) -> None:
        """In parts where it is large: none of it can be seen before all of it can."""
        with self._answering(path):
            obstore.put(self._store, path, file, chunk_size=_CHUNK_BYTES)

    def chunks(self, path: str) -> Iterator[bytes] | None:
        """The content of an object, piece by piece; None where there is none."""
        with self._answering(path):
            try:
                found = obstore.get(self._store, path)
            except FileNotFoundError:
                return None
        return self._chunks(path, found)

    def _chunks(self, path: str, found: "obstore.GetResult") -> Iterator[bytes]:
        with self._answering(path):
            for chunk in found.stream(min_chunk_size=_CHUNK_BYTES):
                yield bytes(chunk)

    def paths(self, prefix: str) -> Iterator[str]:
        """Of all objects below ``prefix``."""
        yield from (found["path"] for found in self._list(prefix))

    def objects(self) -> Iterator[tuple[str, int, float]]:
        """Path, bytes and time of writing (seconds since the epoch) of every object."""
        for found in self._list(None):
            yield found["path"], found["size"], found["last_modified"].timestamp()

    def _list(self, prefix: str | None) -> Iterator["obstore.ObjectMeta"]:
        with self._answering(prefix or ""):
            for chunk in obstore.list(self._store, prefix):
                yield from chunk

    def delete(self, paths: list[str]) -> None:
        """Paths that are not there are fine."""
        if paths:
            with self._answering(paths[0]):
                obstore.delete(self._store, paths)

    def check(self) -> None:
        """Raise Unavailable unless it can be written to."""
        probe = f".probe-{uuid.uuid4().hex}"
        self.create(probe, b"")
        self.delete([probe])

    @contextmanager
    def _answering(self, path: str) -> Iterator[None]:
        try:
            yield
        except BaseError as error:
            told = str(error).partition("\n")[0]
            raise Unavailable(f"{self.url}/{path}: {told}") from error
