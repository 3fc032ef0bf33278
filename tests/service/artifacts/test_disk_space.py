"""A disk that fills up at any write: nothing half-written is visible, and all works once there is space again."""

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from service.artifacts import LocalArtifacts
from service.artifacts.disk_space import is_disk_full, translate_disk_full
from service.core.errors import DiskFull
from service.ingest.formats import DataFormat
from service.ingest.ingest import Ingest
from tests.support.artifacts import files_below
from tests.support.control_plane import ndjson
from tests.support.small_disk import SmallDisk, small_disk

MIB = 1 << 20
PAGE = 4096
KEY = "pack/a"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 4 * MIB) as disk:
        yield disk


def files_on(disk: SmallDisk) -> list[Path]:
    return [path for path in files_below(disk.path) if path.name != ".ballast"]


def test_an_artifact_is_whole_or_absent_wherever_the_disk_fills_up(disk: SmallDisk) -> None:
    artifacts = LocalArtifacts(disk.path)
    failures = 0
    for pages in range(60):
        disk.fill(leave=pages * PAGE)
        try:
            with artifacts.writing(KEY) as directory:
                save_file({"weights": torch.ones(20_000)}, directory / "model.safetensors")
                (directory / "state.json").write_text("{}" * 5000)
                artifacts.publish(KEY, directory, {})
        except DiskFull:
            failures += 1
            assert artifacts.manifest(KEY) is None
            assert files_on(disk) == []
        else:
            artifacts.open(KEY)
            break
        finally:
            disk.clear()
    assert failures > 20
    assert artifacts.manifest(KEY) is not None


def test_a_small_artifact_is_whole_or_absent_wherever_the_disk_fills_up(disk: SmallDisk) -> None:
    artifacts = LocalArtifacts(disk.path)
    failures = 0
    for pages in range(40):
        disk.fill(leave=pages * PAGE)
        try:
            artifacts.publish_small(KEY, {"a": bytes(30_000), "b": bytes(10_000)}, {})
        except DiskFull:
            failures += 1
            assert artifacts.manifest(KEY) is None
            assert files_on(disk) == []
        else:
            break
        finally:
            disk.clear()
    assert failures > 5
    assert artifacts.open(KEY).joinpath("a").read_bytes() == bytes(30_000)


def test_an_upload_is_stored_whole_or_not_at_all(disk: SmallDisk) -> None:
    artifacts = LocalArtifacts(disk.path)
    generator = random.Random(0)  # stored documents are compressed: random text stays large
    body = ndjson(*(generator.randbytes(1000).hex() for _ in range(100)))
    failures = 0
    for pages in range(0, 200, 4):
        disk.fill(leave=pages * PAGE)
        try:
            with Ingest(artifacts, DataFormat.NDJSON) as ingest:
                for start in range(0, len(body), 16_384):
                    ingest.feed(body[start : start + 16_384])
                ingest.end()
                published = ingest.publish_version([], [], 0.1)
        except DiskFull:
            failures += 1
            assert artifacts.keys("data") == []
            assert files_on(disk) == []
        else:
            artifacts.open(published.manifest.key)
            break
        finally:
            disk.clear()
    assert failures > 5
    assert len(artifacts.keys("data")) == 1


@pytest.mark.parametrize(
    "message", ["I/O error: No space left on device (os error 28)", "[Errno 28] No space"]
)
def test_a_native_library_reports_a_full_disk_in_its_message(message: str) -> None:
    assert is_disk_full(RuntimeError(message))
    error = ValueError("while saving")
    error.__cause__ = RuntimeError(message)
    with pytest.raises(DiskFull, match="no disk space left for x"), translate_disk_full("x"):
        raise error


def test_other_errors_are_not_translated() -> None:
    assert not is_disk_full(OSError(errno.EACCES, "os error 28 in a name"))
    with pytest.raises(PermissionError), translate_disk_full("x"):
        raise PermissionError(errno.EACCES, "no")
