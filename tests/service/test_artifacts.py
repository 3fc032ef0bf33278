"""Artifacts on disk and in an object store: whole or not there, never overwritten, never trusted unverified."""

import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.artifacts import Artifacts
from service.core.errors import ArtifactCorrupt, ArtifactMissing, Unavailable
from service.core.manifest import MANIFEST, Manifest
from service.object_store import ObjectStore
from service.settings import Settings
from tests.support.artifacts import FILES, KEY, content_of, publish, s3_url
from tests.support.s3 import BUCKET, S3Server


@pytest.fixture(params=["disk", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store that is empty."""
    if request.param == "disk":
        return (tmp_path / "artifacts").as_uri()
    request.getfixturevalue("s3")
    return s3_url(tmp_path, "cache")


@pytest.fixture
def artifacts(url: str) -> Artifacts:
    return Artifacts.from_url(url)


# --- both ---


def test_what_is_published_is_there_whole(artifacts: Artifacts) -> None:
    assert artifacts.manifest(KEY) is None
    with pytest.raises(ArtifactMissing):
        artifacts.open(KEY)
    manifest = publish(artifacts)
    assert artifacts.manifest(KEY) == manifest
    assert (manifest.result, manifest.bytes) == ({"rows": 3}, 1002)
    assert content_of(artifacts.open(KEY)) == FILES
    assert artifacts.path(manifest, "deep/er/b.json").read_bytes() == b"{}"
    with pytest.raises(ArtifactMissing):
        artifacts.path(manifest, "deep")


def test_another_process_finds_it_by_the_url(artifacts: Artifacts) -> None:
    publish(artifacts)
    other = Artifacts.from_url(artifacts.url)
    assert (other.url, other.root) == (artifacts.url, artifacts.root)
    assert content_of(other.open(KEY)) == FILES
    assert content_of(pickle.loads(pickle.dumps(other)).open(KEY)) == FILES


def test_what_is_there_is_not_overwritten_and_the_later_takes_it_over(artifacts: Artifacts) -> None:
    first = publish(artifacts)
    assert publish(artifacts, KEY, other=b"x") == first
    assert content_of(artifacts.open(KEY)) == FILES
    kept = {path.name for path in (artifacts.root / KEY).iterdir()} - {MANIFEST}
    assert kept == {first.directory}


def test_of_many_at_once_one_is_published(artifacts: Artifacts) -> None:
    together = threading.Barrier(8)

    def one(number: int) -> Manifest:
        with artifacts.writing(KEY) as directory:
            (directory / "number").write_text(str(number))
            together.wait()
            return artifacts.publish(KEY, directory, {"number": number})

    with ThreadPoolExecutor(8) as threads:
        manifests = list(threads.map(one, range(8)))
    assert len({manifest.directory for manifest in manifests}) == 1
    number = manifests[0].result["number"]
    assert content_of(artifacts.open(KEY)) == {"number": str(number).encode()}


def test_what_fails_before_it_is_published_leaves_nothing(artifacts: Artifacts) -> None:
    def fail() -> None:
        with artifacts.writing(KEY) as directory:
            (directory / "a").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert artifacts.manifest(KEY) is None
    assert not [path for path in artifacts.root.rglob("*") if path.is_file()]


def test_keys_are_those_one_level_below(artifacts: Artifacts) -> None:
    for key in ("run/a/1", "run/a/2", "run/a/2/3", "run/b/1", "run/ab/1"):
        publish(artifacts, key)
    assert artifacts.keys("run/a") == ["run/a/1", "run/a/2"]
    assert artifacts.keys("run/b") == ["run/b/1"]
    assert artifacts.keys("run/c") == artifacts.keys("nothing") == []


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/./b"])
def test_a_key_that_leaves_its_place_is_refused(artifacts: Artifacts, key: str) -> None:
    with pytest.raises(ValueError, match="not an artifact key"):
        artifacts.manifest(key)


def test_a_store_that_can_be_written_to_is_checked_and_left_as_it_was(artifacts: Artifacts) -> None:
    artifacts.check()
    assert not [path for path in artifacts.root.rglob("*") if path.is_file()]
    assert artifacts.keys("x") == []


@pytest.mark.parametrize("url", ["ftp://a/b", "s3://bucket/prefix", "s3:///prefix#cache=/tmp", "nothing"])
def test_a_url_of_no_store_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="artifacts URL"):
        Artifacts.from_url(url)


def test_settings_give_an_object_store_its_cache(tmp_path: Path) -> None:
    plain = Settings(home=tmp_path, artifacts_url="s3://bucket/a/prefix/")
    found = Artifacts.from_url(plain.artifacts)
    assert (found.root, found.url) == (
        tmp_path / "cache",
        f"s3://bucket/a/prefix#cache={str(tmp_path / 'cache').replace('/', '%2F')}",
    )
    other = Settings(home=tmp_path, artifacts_url="s3://bucket", artifacts_cache=tmp_path / "a b#c")
    assert Artifacts.from_url(other.artifacts).root == tmp_path / "a b#c"


# --- small ones: files in the manifest ---

SMALL = {"a.bin": bytes(range(256)), "deep/b.json": b"{}", "empty": b""}


def publish_small(artifacts: Artifacts, **files: bytes) -> Manifest:
    return artifacts.publish_small(KEY, files or SMALL, {"rows": 3, "none": None})


def test_small_files_are_published_with_one_write_and_opened_like_any(artifacts: Artifacts) -> None:
    assert not artifacts.exists(KEY)
    manifest = publish_small(artifacts)
    assert [file.path for file in artifacts.files()] == [f"{KEY}/{MANIFEST}"]
    assert artifacts.exists(KEY)
    other = Artifacts.from_url(artifacts.url)
    assert other.manifest(KEY) == manifest
    assert (manifest.result, manifest.bytes, manifest.is_whole) == ({"rows": 3, "none": None}, 258, True)
    assert other.read(manifest, "a.bin") == SMALL["a.bin"]
    assert other.path(manifest, "deep/b.json").read_bytes() == b"{}"
    assert content_of(other.open(KEY)) == SMALL
    with pytest.raises(ArtifactMissing):
        other.read(manifest, "deep")


def test_a_small_artifact_has_the_hash_of_one_whose_files_lie_beside_the_manifest(
    artifacts: Artifacts,
) -> None:
    beside = publish(artifacts, "pack/other", **SMALL)
    assert not beside.is_whole
    assert artifacts.read(beside, "a.bin") == SMALL["a.bin"]
    assert publish_small(artifacts).sha256 == beside.sha256


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "missing"])
def test_a_damaged_copy_of_a_small_file_is_made_again(artifacts: Artifacts, damage: str) -> None:
    manifest = publish_small(artifacts, a=bytes(1000))
    path = artifacts.path(manifest, "a")
    content = DAMAGES[damage](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert content_of(artifacts.open(KEY)) == {"a": bytes(1000)}


def test_a_copy_that_a_power_cut_left_empty_is_made_again_before_it_is_read(artifacts: Artifacts) -> None:
    manifest = publish_small(artifacts, a=bytes(1000))
    artifacts.path(manifest, "a").write_bytes(b"")
    assert artifacts.path(manifest, "a").read_bytes() == bytes(1000)


def test_what_is_read_is_what_the_manifest_says(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    manifest = publish(artifacts)
    artifacts.path(manifest, "a.bin").write_bytes(b"b" * 1000)
    with pytest.raises(ArtifactCorrupt, match=r"a\.bin differs"):
        artifacts.read(manifest, "a.bin")
    artifacts.path(manifest, "a.bin").unlink()
    with pytest.raises(ArtifactCorrupt, match=r"a\.bin is missing"):
        artifacts.read(manifest, "a.bin")


def test_a_small_artifact_outlives_a_collection_that_meets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = Artifacts(tmp_path)
    link, meetings = Artifacts._link, iter(["folder", "manifest"])

    def met(self: Artifacts, manifest: Manifest) -> bool:
        match next(meetings, None):
            case "folder":  # empty, and removed as such
                (tmp_path / KEY).rmdir()
            case "manifest":  # one of the same key was there, and is no longer
                return False
        return link(self, manifest)

    monkeypatch.setattr(Artifacts, "_link", met)
    manifest = publish_small(artifacts)
    assert artifacts.manifest(KEY) == manifest
    assert next(meetings, None) is None


def test_of_many_small_ones_at_once_one_is_published_and_what_is_there_stays(artifacts: Artifacts) -> None:
    with ThreadPoolExecutor(8) as threads:
        manifests = list(threads.map(lambda n: artifacts.publish_small(KEY, {"n": b"%d" % n}, {}), range(8)))
    assert all(manifest == manifests[0] for manifest in manifests)
    assert publish(artifacts) == manifests[0]
    assert [file.path for file in artifacts.files()] == [f"{KEY}/{MANIFEST}"]


def test_a_small_artifact_that_is_removed_leaves_no_copies(artifacts: Artifacts) -> None:
    publish_small(artifacts)
    artifacts.open(KEY)
    artifacts.unpublish([KEY])
    artifacts.remove_files([file.path for file in artifacts.files()])
    assert not artifacts.exists(KEY)
    assert not [path for path in artifacts.root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("damage", ["content", "hash"])
def test_a_small_artifact_whose_manifest_is_damaged_is_not_used(tmp_path: Path, damage: str) -> None:
    artifacts = Artifacts(tmp_path)
    manifest = publish_small(artifacts, a=b"abcdef")
    path = tmp_path / KEY / MANIFEST
    whole = path.read_bytes()
    place = whole.index(b"YWJj" if damage == "content" else manifest.files[0].sha256.encode())
    path.write_bytes(whole[:place] + (b"Z" if damage == "content" else b"!") + whole[place + 1 :])
    with pytest.raises(ArtifactCorrupt, match=r"pack/3f9c: a differs"):
        artifacts.open(KEY)


# --- checkpoints that can't lie ---

DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "one bit flipped": lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],
    "missing": lambda content: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_found_before_it_is_used(tmp_path: Path, damage: str) -> None:
    artifacts = Artifacts(tmp_path)
    manifest = publish(artifacts)
    path = artifacts.path(manifest, "a.bin")
    content = DAMAGES[damage](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactCorrupt, match=r"pack/3f9c: a\.bin"):
        artifacts.open(KEY)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_object_is_found_before_it_is_used(s3: S3Server, tmp_path: Path, damage: str) -> None:
    """By whoever has no copy of it; who has a good one needs no other."""
    mine = Artifacts.from_url(s3_url(tmp_path, "mine"))
    manifest = publish(mine)
    [name] = [name for name in s3.objects(tmp_path.as_posix().strip("/")) if name.endswith("a.bin")]
    content = DAMAGES[damage](s3.client.get_object(Bucket=BUCKET, Key=name)["Body"].read())
    s3.client.delete_object(Bucket=BUCKET, Key=name)
    if content is not None:
        s3.client.put_object(Bucket=BUCKET, Key=name, Body=content)
    others = Artifacts.from_url(s3_url(tmp_path, "others"))
    with pytest.raises(ArtifactCorrupt, match=r"pack/3f9c: a\.bin"):
        others.open(KEY)
    with pytest.raises(ArtifactCorrupt):
        others.path(manifest, "a.bin")
    assert not list(others.root.rglob("*a.bin*"))
    assert content_of(mine.open(KEY)) == FILES


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_fetched_anew(s3: S3Server, tmp_path: Path, damage: str) -> None:
    artifacts = Artifacts.from_url(s3_url(tmp_path, "cache"))
    path = artifacts.path(publish(artifacts), "a.bin")
    content = DAMAGES[damage](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert content_of(artifacts.open(KEY)) == FILES


def test_a_manifest_that_cannot_be_read_is_corrupt(tmp_path: Path, s3: S3Server) -> None:
    disk = Artifacts(tmp_path / "disk")
    publish(disk)
    (disk.root / KEY / MANIFEST).write_text('{"key": "pa')
    store = Artifacts.from_url(s3_url(tmp_path, "cache"))
    name = f"{tmp_path.as_posix().strip('/')}/{KEY}/{MANIFEST}"
    s3.client.put_object(Bucket=BUCKET, Key=name, Body=b'{"key": "pa')
    for artifacts in (disk, store):
        with pytest.raises(ArtifactCorrupt, match="unreadable manifest"):
            artifacts.manifest(KEY)


# --- an object store ---


def test_large_files_go_in_parts_and_come_back_the_same(s3: S3Server, tmp_path: Path) -> None:
    content = bytes(range(256)) * (20 << 12)  # 20 MiB
    publish(Artifacts.from_url(s3_url(tmp_path, "a")), KEY, large=content)
    [name] = [name for name in s3.objects(tmp_path.as_posix().strip("/")) if name.endswith("large")]
    etag = s3.client.head_object(Bucket=BUCKET, Key=name)["ETag"].strip('"')
    assert etag.endswith("-3")  # of as many parts
    other = Artifacts.from_url(s3_url(tmp_path, "b"))
    assert (other.open(KEY) / "large").read_bytes() == content


def test_two_hosts_race_for_one_key_and_the_loser_leaves_no_objects(s3: S3Server, tmp_path: Path) -> None:
    a, b = (Artifacts.from_url(s3_url(tmp_path, name)) for name in "ab")
    with b.writing(KEY) as directory:
        (directory / "late").write_bytes(b"late")
        first = publish(a)
        assert b.publish(KEY, directory, {}) == first
    names = s3.objects(tmp_path.as_posix().strip("/"))
    assert len(names) == len(FILES) + 1
    assert not any(name.endswith("late") for name in names)
    assert content_of(b.open(KEY)) == FILES


def test_files_are_seen_only_with_their_manifest(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies between the two leaves objects that belong to nothing."""
    artifacts = Artifacts.from_url(s3_url(tmp_path, "a"))

    def die(store: ObjectStore, path: str, content: bytes) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "create", die)
        with pytest.raises(KeyboardInterrupt):
            publish(artifacts)
    assert s3.objects(tmp_path.as_posix().strip("/"))
    assert artifacts.manifest(KEY) is None
    assert artifacts.keys("pack") == []
    publish(artifacts)
    assert content_of(artifacts.open(KEY)) == FILES


def test_an_answer_that_is_lost_makes_nobody_a_loser(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest was written, and the retry finds it: it is our own."""
    artifacts = Artifacts.from_url(s3_url(tmp_path, "a"))
    create = ObjectStore.create

    def written_twice(store: ObjectStore, path: str, content: bytes) -> bool:
        assert create(store, path, content)
        return create(store, path, content)

    monkeypatch.setattr(ObjectStore, "create", written_twice)
    publish(artifacts)
    assert content_of(artifacts.open(KEY)) == FILES
    assert content_of(Artifacts.from_url(s3_url(tmp_path, "b")).open(KEY)) == FILES


def test_a_store_that_is_down_for_a_while_is_waited_for(s3: S3Server, tmp_path: Path) -> None:
    artifacts = Artifacts.from_url(s3_url(tmp_path, "a"))
    publish(artifacts)
    with ThreadPoolExecutor(1) as thread:
        with s3.down():
            waiting = thread.submit(publish, artifacts, "pack/other")
            time.sleep(0.5)
            assert not waiting.done()
        assert waiting.result(timeout=30).key == "pack/other"
    assert content_of(artifacts.open("pack/other")) == FILES


def test_a_store_that_stays_down_is_unavailable(s3: S3Server, tmp_path: Path) -> None:
    url = s3_url(tmp_path, "a").partition("#")[0]
    impatient = Artifacts(tmp_path / "a", ObjectStore(url, retry_seconds=0.3))
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
        # What there is a copy of can be had of whoever knows its manifest.
        assert impatient.path(manifest, "a.bin").read_bytes() == FILES["a.bin"]
    assert impatient.manifest("pack/other") is None


def test_what_is_unpublished_is_not_there_and_can_be_published_again(artifacts: Artifacts) -> None:
    publish(artifacts)
    publish(artifacts, "pack/other")
    before = {file.path for file in artifacts.files()}
    artifacts.unpublish([KEY, "pack/unknown"])
    assert artifacts.manifest(KEY) is None
    assert artifacts.keys("pack") == ["pack/other"]
    left = {file.path for file in artifacts.files()}
    assert before - left == {f"{KEY}/{MANIFEST}"}
    artifacts.remove_files([path for path in left if path.startswith(KEY)])
    assert {file.path for file in artifacts.files()} == {
        path for path in before if path.startswith("pack/other")
    }
    publish(artifacts)
    assert content_of(artifacts.open(KEY)) == FILES
    assert content_of(artifacts.open("pack/other")) == FILES


def test_files_are_told_with_their_sizes_and_times(artifacts: Artifacts) -> None:
    began = time.time()
    publish(artifacts)
    sizes = {file.path.rpartition("/")[2]: file.bytes for file in artifacts.files()}
    assert sizes.pop(MANIFEST) > 100
    assert sizes == {"a.bin": 1000, "b.json": 2, "empty": 0}
    assert all(began - 2 < file.modified < time.time() + 2 for file in artifacts.files())


def test_folders_that_are_empty_go_with_their_last_file(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    publish(artifacts)
    artifacts.unpublish([KEY])
    artifacts.remove_files([file.path for file in artifacts.files()])
    assert list(tmp_path.iterdir()) == []
