"""Artifacts in an object store: races between hosts, lost responses, outages, and damaged objects and copies."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.artifacts import S3Artifacts, open_artifacts
from service.artifacts.object_store import ObjectStore
from service.core.errors import ArtifactCorrupt, Unavailable
from service.core.manifest import MANIFEST
from tests.service.artifacts.conftest import Damage
from tests.support.artifacts import FILES, KEY, content_of, publish, s3_prefix, s3_url
from tests.support.s3 import BUCKET, S3Server


def object_named(s3: S3Server, tmp_path: Path, ending: str) -> str:
    [name] = [name for name in s3.objects(s3_prefix(tmp_path)) if name.endswith(ending)]
    return name


# --- damage ---


def test_a_damaged_object_is_found_by_hosts_without_a_good_copy(
    s3: S3Server, tmp_path: Path, damage: Damage
) -> None:
    with_copy = open_artifacts(s3_url(tmp_path, "a"))
    manifest = publish(with_copy)
    name = object_named(s3, tmp_path, "a.bin")
    file = tmp_path / "object"
    file.write_bytes(s3.client.get_object(Bucket=BUCKET, Key=name)["Body"].read())
    damage(file)
    s3.client.delete_object(Bucket=BUCKET, Key=name)
    if file.exists():
        s3.client.put_object(Bucket=BUCKET, Key=name, Body=file.read_bytes())
    without_copy = open_artifacts(s3_url(tmp_path, "b"))
    with pytest.raises(ArtifactCorrupt, match=r"pack/3f9c: a\.bin"):
        without_copy.open(KEY)
    with pytest.raises(ArtifactCorrupt):
        without_copy.path(manifest, "a.bin")
    assert not list(without_copy.root.rglob("*a.bin*"))
    assert content_of(with_copy.open(KEY)) == FILES


def test_a_damaged_copy_is_fetched_again(s3: S3Server, tmp_path: Path, damage: Damage) -> None:
    artifacts = open_artifacts(s3_url(tmp_path, "cache"))
    damage(artifacts.path(publish(artifacts), "a.bin"))
    assert content_of(artifacts.open(KEY)) == FILES


def test_an_unreadable_manifest_is_corrupt(s3: S3Server, tmp_path: Path) -> None:
    artifacts = open_artifacts(s3_url(tmp_path, "cache"))
    name = f"{s3_prefix(tmp_path)}/{KEY}/{MANIFEST}"
    s3.client.put_object(Bucket=BUCKET, Key=name, Body=b'{"key": "pa')
    with pytest.raises(ArtifactCorrupt, match="unreadable manifest"):
        artifacts.manifest(KEY)


# --- uploads and races ---


def test_large_files_are_uploaded_in_parts(s3: S3Server, tmp_path: Path) -> None:
    content = bytes(range(256)) * (20 << 12)  # 20 MiB
    publish(open_artifacts(s3_url(tmp_path, "a")), KEY, large=content)
    etag = s3.client.head_object(Bucket=BUCKET, Key=object_named(s3, tmp_path, "large"))["ETag"].strip('"')
    assert etag.endswith("-3")  # the number of parts
    other = open_artifacts(s3_url(tmp_path, "b"))
    assert (other.open(KEY) / "large").read_bytes() == content


def test_the_loser_of_a_race_between_hosts_leaves_no_objects(s3: S3Server, tmp_path: Path) -> None:
    a, b = (open_artifacts(s3_url(tmp_path, name)) for name in "ab")
    with b.writing(KEY) as directory:
        (directory / "late").write_bytes(b"late")
        first = publish(a)
        assert b.publish(KEY, directory, {}) == first
    names = s3.objects(s3_prefix(tmp_path))
    assert len(names) == len(FILES) + 1
    assert not any(name.endswith("late") for name in names)
    assert content_of(b.open(KEY)) == FILES


def test_files_without_a_manifest_are_no_artifact(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies between its files and the manifest leaves orphaned objects."""
    artifacts = open_artifacts(s3_url(tmp_path, "a"))

    def die(store: ObjectStore, path: str, content: bytes) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "create", die)
        with pytest.raises(KeyboardInterrupt):
            publish(artifacts)
    assert s3.objects(s3_prefix(tmp_path))
    assert artifacts.manifest(KEY) is None
    assert artifacts.keys("pack") == []
    publish(artifacts)
    assert content_of(artifacts.open(KEY)) == FILES


def test_an_attempt_whose_response_was_lost_keeps_its_files(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first request wrote the manifest, and its retry finds it: the attempt has not lost a race."""
    artifacts = open_artifacts(s3_url(tmp_path, "a"))
    create = ObjectStore.create

    def create_twice(store: ObjectStore, path: str, content: bytes) -> bool:
        assert create(store, path, content)
        return create(store, path, content)

    monkeypatch.setattr(ObjectStore, "create", create_twice)
    publish(artifacts)
    assert content_of(artifacts.open(KEY)) == FILES
    assert content_of(open_artifacts(s3_url(tmp_path, "b")).open(KEY)) == FILES


# --- outages ---


def test_a_short_outage_is_waited_for(s3: S3Server, tmp_path: Path) -> None:
    artifacts = open_artifacts(s3_url(tmp_path, "a"))
    publish(artifacts)
    with ThreadPoolExecutor(1) as thread:
        with s3.down():
            publishing = thread.submit(publish, artifacts, "pack/other")
            time.sleep(0.5)
            assert not publishing.done()
        assert publishing.result(timeout=30).key == "pack/other"
    assert content_of(artifacts.open("pack/other")) == FILES


def test_a_long_outage_raises_unavailable(s3: S3Server, tmp_path: Path) -> None:
    bucket_url = s3_url(tmp_path, "a").partition("#")[0]
    impatient = S3Artifacts(tmp_path / "a", ObjectStore(bucket_url, retry_seconds=0.3))
    manifest = publish(impatient)
    with s3.down():
        for call in (
            lambda: impatient.manifest(KEY),
            lambda: impatient.open(KEY),
            lambda: impatient.keys("pack"),
            impatient.check,
            lambda: publish(impatient, "pack/other"),
        ):
            with pytest.raises(Unavailable, match="s3://"):
                call()
        # A cached file needs no request if the caller has the manifest.
        assert impatient.path(manifest, "a.bin").read_bytes() == FILES["a.bin"]
    assert impatient.manifest("pack/other") is None
