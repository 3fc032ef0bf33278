"""The cache of an object store stays below its size limit and never evicts what is in use."""

import os
import time
from pathlib import Path

from service.artifacts import open_artifacts
from tests.support.artifacts import FILES, KEY, content_of, publish, s3_url
from tests.support.s3 import S3Server


def test_the_least_recently_used_artifacts_are_evicted(s3: S3Server, tmp_path: Path) -> None:
    size = 1000
    writer = open_artifacts(s3_url(tmp_path, "writer"))
    keys = [f"pack/{number}" for number in range(4)]
    for key in keys:
        publish(writer, key, file=b"x" * size)
    reader = open_artifacts(s3_url(tmp_path, "reader") + f"&max_bytes={2 * size}")

    def cached() -> list[str]:
        return sorted(path.parent.parent.name for path in reader.root.rglob("file"))

    folders = [reader.open(key) for key in keys[:3]]
    assert cached() == ["0", "1", "2"]  # above the limit, but all are in use
    for hours, folder in zip((2, 4, 3), folders, strict=True):
        os.utime(folder, (time.time() - hours * 3600,) * 2)
    reader.open(keys[0])
    reader.open(keys[3])
    assert cached() == ["0", "3"]
    for key in keys:
        assert content_of(reader.open(key)) == {"file": b"x" * size}


def test_an_open_file_of_an_evicted_artifact_stays_readable(s3: S3Server, tmp_path: Path) -> None:
    writer = open_artifacts(s3_url(tmp_path, "writer"))
    publish(writer)
    publish(writer, "pack/other")
    reader = open_artifacts(s3_url(tmp_path, "reader") + "&max_bytes=0")
    folder = reader.open(KEY)
    with (folder / "a.bin").open("rb") as file:
        os.utime(folder, (0, 0))
        reader.open("pack/other")
        assert not folder.exists()
        assert file.read() == FILES["a.bin"]
