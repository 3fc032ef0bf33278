"""Artifacts in an object store, with a local folder that caches their files. The folder holds no manifests."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlencode, urlparse

from service.artifacts import cache
from service.artifacts.base import Artifacts
from service.artifacts.layout import StoredFile, check_key, directory_path, file_path, manifest_path
from service.artifacts.object_store import ObjectStore
from service.core.errors import ArtifactCorrupt, Unavailable
from service.core.manifest import MANIFEST, FileEntry, Manifest


class S3Artifacts(Artifacts):
    """``root`` is the cache; ``max_cache_bytes`` limits its size."""

    is_remote = True

    def __init__(self, root: Path, store: ObjectStore, *, max_cache_bytes: int | None = None) -> None:
        super().__init__(root)
        self._store = store
        self._max_cache_bytes = max_cache_bytes

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open a URL that ``s3_url`` made. Raises ValueError."""
        bucket_url, _, fragment = url.partition("#")
        options = {name: values[0] for name, values in parse_qs(fragment).items()}
        if not urlparse(bucket_url).netloc or "cache" not in options:
            raise ValueError(f"artifacts URL {url!r}: use s3://bucket/prefix#cache=/path")
        max_bytes = int(options["max_bytes"]) if "max_bytes" in options else None
        return cls(Path(options["cache"]), ObjectStore(bucket_url), max_cache_bytes=max_bytes)

    @property
    def url(self) -> str:
        return s3_url(self._store.url, self.root, self._max_cache_bytes)

    def check(self) -> None:
        super().check()
        self._store.check()

    def keys(self, prefix: str) -> list[str]:
        check_key(prefix)
        num_parts = prefix.count("/") + 3  # prefix, name, manifest
        found = (path.split("/") for path in self._store.paths(prefix))
        return sorted(
            "/".join(parts[:-1]) for parts in found if len(parts) == num_parts and parts[-1] == MANIFEST
        )

    def location(self, manifest: Manifest) -> str:
        return f"{self._store.url}/{directory_path(manifest)}"

    def open(self, key: str) -> Path:
        manifest = self._existing(key)
        directory = self._directory(manifest)
        if directory.is_dir():
            cache.mark_used(directory)  # before reading, so that another process does not evict it
        if self._restore_damaged(manifest) and self._max_cache_bytes is not None:
            cache.evict(self.root, self._max_cache_bytes)
        return directory

    def path(self, manifest: Manifest, name: str) -> Path:
        path = super().path(manifest, name)
        cache.mark_used(self._directory(manifest))
        return path

    def files(self) -> Iterator[StoredFile]:
        return self._store.files()

    def unpublish(self, keys: Sequence[str]) -> None:
        super().unpublish(keys)
        for key in keys:
            cache.remove_copies(self._folder(key))

    def remove_files(self, paths: Sequence[str]) -> None:
        self._store.delete(list(paths))
        super().remove_files(paths)

    def _read_manifest(self, key: str) -> bytes | None:
        check_key(key)
        return self._store.read(manifest_path(key))

    def _publish_files(self, manifest: Manifest) -> bool:
        for entry in manifest.files:
            path = file_path(manifest, entry.path)
            self._store.upload(path, self.root / path)
        return self._publish_inlined(manifest)

    def _publish_inlined(self, manifest: Manifest) -> bool:
        return self._store.create(manifest_path(manifest.key), manifest.to_json())

    def _fetch(self, manifest: Manifest, entry: FileEntry) -> Iterable[bytes]:
        chunks = self._store.chunks(file_path(manifest, entry.path))
        if chunks is None:
            raise ArtifactCorrupt(f"{manifest.key}: {entry.path} is missing")
        return chunks

    def _discard(self, manifest: Manifest) -> None:
        super()._discard(manifest)
        # If the store does not answer, garbage collection removes these objects later.
        with suppress(Unavailable):
            self._store.delete([file_path(manifest, entry.path) for entry in manifest.files])


def s3_url(bucket_url: str, cache_folder: Path, max_cache_bytes: int | None = None) -> str:
    """The artifacts URL of ``s3://bucket/prefix`` with its cache folder and the cache's size limit."""
    options: dict[str, object] = {"cache": cache_folder}
    if max_cache_bytes is not None:
        options["max_bytes"] = max_cache_bytes
    return f"{bucket_url}#{urlencode(options)}"
