"""Publish and read small artifacts, and URLs of a test's own object store."""

from pathlib import Path

from service.artifacts import Artifacts
from service.core.manifest import MANIFEST, Manifest
from tests.support.s3 import BUCKET

KEY = "pack/3f9c"
FILES = {"a.bin": b"a" * 1000, "deep/er/b.json": b"{}", "empty": b""}


def s3_url(tmp_path: Path, cache: str) -> str:
    """The URL of this test's object store, with the cache folder of that name."""
    return f"s3://{BUCKET}/{s3_prefix(tmp_path)}#cache={tmp_path / cache}"


def s3_prefix(tmp_path: Path) -> str:
    """The prefix in the bucket that belongs to this test."""
    return tmp_path.as_posix().strip("/")


def publish(artifacts: Artifacts, key: str = KEY, **files: bytes) -> Manifest:
    with artifacts.writing(key) as directory:
        for name, content in (files or FILES).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        return artifacts.publish(key, directory, {"rows": 3})


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_below(folder)}


def published_keys(artifacts: Artifacts) -> list[str]:
    """The keys of all published artifacts, of every kind."""
    paths = (file.path for file in artifacts.files())
    return [path.removesuffix(f"/{MANIFEST}") for path in paths if path.endswith(f"/{MANIFEST}")]
