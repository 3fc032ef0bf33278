"""The cache of an object store: below its size, and never from under who uses it."""

import os
import time
from pathlib import Path

from service.artifacts import Artifacts
from tests.support.artifacts import FILES, KEY, content_of, publish, s3_url
from tests.support.s3 import S3Server


def test_a_cache_stays_below_its_size_and_keeps_what_was_used_last(s3: S3Server, tmp_path: Path) -> None:
    size = len(b"x") * 1000
    url = s3_url(tmp_path, "cache")
    writer = Artifacts.from_url(url)
    keys = [f"pack/{number}" for number in range(4)]
    for key in keys:
        publish(writer, key, file=b"x" * size)
    reader = Artifacts.from_url(s3_url(tmp_path, "other") + f"&max_bytes={2 * size}")
    assert Artifacts.from_url(reader.url).url == reader.url

    def copies() -> list[str]:
        return sorted(path.parent.parent.name for path in reader.root.rglob("file"))

    folders = [reader.open(key) for key in keys[:3]]
    assert copies() == ["0", "1", "2"]  # over its size, but all in use
    for hours, folder in zip((2, 4, 3), folders, strict=True):
        os.utime(folder, (time.time() - hours * 3600,) * 2)
    reader.open(keys[0])
    reader.open(keys[3])
    assert copies() == ["0", "3"]
    for key in keys:
        assert content_of(reader.open(key)) == {"file": b"x" * size}


def test_an_open_file_of_an_evicted_artifact_can_still_be_read(s3: S3Server, tmp_path: Path) -> None:
    publish(Artifacts.from_url(s3_url(tmp_path, "cache")))
    reader = Artifacts.from_url(s3_url(tmp_path, "other") + "&max_bytes=0")
    folder = reader.open(KEY)
    with (folder / "a.bin").open("rb") as file:
        os.utime(folder, (0, 0))
        publish(reader, "pack/other")
        other = Artifacts.from_url(s3_url(tmp_path, "cache"))
        publish(other, "pack/third")
        reader.open("pack/third")
        assert not folder.exists()
        assert file.read() == FILES["a.bin"]
