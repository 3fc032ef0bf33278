"""A disk that fills at any write: nothing half made can be seen, and all is well once there is room."""

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from service.artifacts import Artifacts
from service.core.errors import NoRoom
from service.ingest.formats import DataFormat
from service.ingest.ingest import Ingest
from service.room import is_full, room_for
from tests.support.control_plane import ndjson
from tests.support.small_disk import SmallDisk, small_disk

MIB = 1 << 20
PAGE = 4096
KEY = "pack/a"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 4 * MIB) as disk:
        yield disk


def left_over(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and path.name != ".ballast"]


def test_an_artifact_is_whole_or_not_there_wherever_the_disk_ends(disk: SmallDisk) -> None:
    artifacts = Artifacts(disk.path)
    failed = 0
    for pages in range(60):
        disk.fill(leave=pages * PAGE)
        try:
            with artifacts.writing(KEY) as directory:
                save_file({"weights": torch.ones(20_000)}, directory / "model.safetensors")
                (directory / "state.json").write_text("{}" * 5000)
                artifacts.publish(KEY, directory, {})
        except NoRoom:
            failed += 1
            assert artifacts.manifest(KEY) is None
            assert left_over(disk.path) == []
        else:
            artifacts.open(KEY)
            break
        finally:
            disk.clear()
    assert failed > 20
    assert artifacts.manifest(KEY) is not None


def test_a_small_artifact_is_whole_or_not_there_wherever_the_disk_ends(disk: SmallDisk) -> None:
    artifacts = Artifacts(disk.path)
    failed = 0
    for pages in range(40):
        disk.fill(leave=pages * PAGE)
        try:
            artifacts.publish_small(KEY, {"a": bytes(30_000), "b": bytes(10_000)}, {})
        except NoRoom:
            failed += 1
            assert artifacts.manifest(KEY) is None
            assert left_over(disk.path) == []
        else:
            break
        finally:
            disk.clear()
    assert failed > 5
    assert artifacts.open(KEY).joinpath("a").read_bytes() == bytes(30_000)


def test_a_body_is_taken_whole_or_not_at_all(disk: SmallDisk) -> None:
    artifacts = Artifacts(disk.path)
    chance = random.Random(0)  # documents are compressed
    body = ndjson(*(chance.randbytes(1000).hex() for _ in range(100)))
    failed = 0
    for pages in range(0, 200, 4):
        disk.fill(leave=pages * PAGE)
        try:
            with Ingest(artifacts, DataFormat.NDJSON) as ingest:
                for start in range(0, len(body), 16_384):
                    ingest.feed(body[start : start + 16_384])
                ingest.end()
                published = ingest.publish_version([], [], 0.1)
        except NoRoom:
            failed += 1
            assert artifacts.keys("data") == []
            assert left_over(disk.path) == []
        else:
            artifacts.open(published.manifest.key)
            break
        finally:
            disk.clear()
    assert failed > 5
    assert len(artifacts.keys("data")) == 1


@pytest.mark.parametrize("told", ["I/O error: No space left on device (os error 28)", "[Errno 28] No space"])
def test_libraries_tell_in_their_text(told: str) -> None:
    assert is_full(RuntimeError(told))
    error = ValueError("while saving")
    error.__cause__ = RuntimeError(told)
    with pytest.raises(NoRoom), room_for("x"):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    assert not is_full(OSError(errno.EACCES, "os error 28 in a name"))
    with pytest.raises(PermissionError), room_for("x"):
        raise PermissionError(errno.EACCES, "no")
