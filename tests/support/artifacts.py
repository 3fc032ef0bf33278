"""Small artifacts to publish, and an object store of a test's own to publish them in."""

from pathlib import Path

from service.artifacts import Artifacts
from service.core.manifest import MANIFEST, Manifest
from tests.support.s3 import BUCKET

KEY = "pack/3f9c"
FILES = {"a.bin": b"a" * 1000, "deep/er/b.json": b"{}", "empty": b""}


def s3_url(tmp_path: Path, cache: str) -> str:
    """The same store for the same test, with a cache of that name."""
    prefix = tmp_path.as_posix().strip("/")
    return f"s3://{BUCKET}/{prefix}#cache={tmp_path / cache}"


def publish(artifacts: Artifacts, key: str = KEY, **files: bytes) -> Manifest:
    with artifacts.writing(key) as directory:
        for name, content in (files or FILES).items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)
        return artifacts.publish(key, directory, {"rows": 3})


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def published_keys(artifacts: Artifacts) -> list[str]:
    """Keys of everything that is published, whatever it is of."""
    paths = (file.path for file in artifacts.files())
    return [path.removesuffix(f"/{MANIFEST}") for path in paths if path.endswith(f"/{MANIFEST}")]
