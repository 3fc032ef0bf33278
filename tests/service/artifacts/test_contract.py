"""What every artifact store guarantees: an artifact is whole or absent, and is never overwritten."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.artifacts import Artifacts, open_artifacts
from service.core.errors import ArtifactMissing
from service.core.manifest import MANIFEST, Manifest
from tests.service.artifacts.conftest import Damage
from tests.support.artifacts import FILES, KEY, content_of, files_below, publish

SMALL = {"a.bin": bytes(range(256)), "deep/b.json": b"{}", "empty": b""}


def publish_small(artifacts: Artifacts, **files: bytes) -> Manifest:
    return artifacts.publish_small(KEY, files or SMALL, {"rows": 3, "none": None})


# --- publish and open ---


def test_a_published_artifact_has_all_its_files(artifacts: Artifacts) -> None:
    manifest = publish(artifacts)
    assert artifacts.exists(KEY)
    assert artifacts.manifest(KEY) == manifest
    assert (manifest.result, manifest.bytes) == ({"rows": 3}, 1002)
    assert content_of(artifacts.open(KEY)) == FILES
    assert artifacts.path(manifest, "deep/er/b.json").read_bytes() == b"{}"
    assert artifacts.read(manifest, "deep/er/b.json") == b"{}"
    assert artifacts.location(manifest).endswith(f"{KEY}/{manifest.directory}")


def test_an_artifact_that_was_not_published_is_missing(artifacts: Artifacts) -> None:
    assert not artifacts.exists(KEY)
    assert artifacts.manifest(KEY) is None
    with pytest.raises(ArtifactMissing):
        artifacts.open(KEY)


@pytest.mark.parametrize("small", [False, True])
def test_a_file_that_the_manifest_does_not_list_is_missing(artifacts: Artifacts, small: bool) -> None:
    manifest = publish_small(artifacts) if small else publish(artifacts)
    with pytest.raises(ArtifactMissing):
        artifacts.path(manifest, "deep")
    with pytest.raises(ArtifactMissing):
        artifacts.read(manifest, "deep")


def test_another_process_opens_the_same_artifacts_by_url_or_pickle(artifacts: Artifacts) -> None:
    publish(artifacts)
    other = open_artifacts(artifacts.url)
    assert (other.url, other.root) == (artifacts.url, artifacts.root)
    assert content_of(other.open(KEY)) == FILES
    assert content_of(pickle.loads(pickle.dumps(other)).open(KEY)) == FILES


def test_publishing_again_returns_the_first_manifest_and_keeps_its_files(artifacts: Artifacts) -> None:
    first = publish(artifacts)
    assert publish(artifacts, KEY, other=b"x") == first
    assert content_of(artifacts.open(KEY)) == FILES
    remaining = {path.name for path in (artifacts.root / KEY).iterdir()} - {MANIFEST}
    assert remaining == {first.directory}


def test_one_of_many_concurrent_attempts_is_published(artifacts: Artifacts) -> None:
    all_written = threading.Barrier(8)

    def attempt(number: int) -> Manifest:
        with artifacts.writing(KEY) as directory:
            (directory / "number").write_text(str(number))
            all_written.wait()
            return artifacts.publish(KEY, directory, {"number": number})

    with ThreadPoolExecutor(8) as threads:
        manifests = list(threads.map(attempt, range(8)))
    assert len({manifest.directory for manifest in manifests}) == 1
    number = manifests[0].result["number"]
    assert content_of(artifacts.open(KEY)) == {"number": str(number).encode()}


def test_an_attempt_that_fails_leaves_no_files(artifacts: Artifacts) -> None:
    def fail() -> None:
        with artifacts.writing(KEY) as directory:
            (directory / "a").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert artifacts.manifest(KEY) is None
    assert not files_below(artifacts.root)


def test_keys_lists_exactly_one_level(artifacts: Artifacts) -> None:
    for key in ("run/a/1", "run/a/2", "run/a/2/3", "run/b/1", "run/ab/1"):
        publish(artifacts, key)
    assert artifacts.keys("run/a") == ["run/a/1", "run/a/2"]
    assert artifacts.keys("run/b") == ["run/b/1"]
    assert artifacts.keys("run/c") == artifacts.keys("nothing") == []


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/./b"])
def test_a_key_that_is_no_relative_path_is_rejected(artifacts: Artifacts, key: str) -> None:
    for look_up in (artifacts.manifest, artifacts.exists, artifacts.open, artifacts.keys):
        with pytest.raises(ValueError, match="not an artifact key"):
            look_up(key)


def test_check_leaves_nothing_behind(artifacts: Artifacts) -> None:
    artifacts.check()
    assert not files_below(artifacts.root)
    assert list(artifacts.files()) == []


# --- small files inside the manifest ---


def test_small_files_take_one_write_and_open_like_any_others(artifacts: Artifacts) -> None:
    manifest = publish_small(artifacts)
    assert [file.path for file in artifacts.files()] == [f"{KEY}/{MANIFEST}"]
    assert artifacts.exists(KEY)
    other = open_artifacts(artifacts.url)
    assert other.manifest(KEY) == manifest
    assert (manifest.result, manifest.bytes, manifest.is_inlined) == ({"rows": 3, "none": None}, 258, True)
    assert other.read(manifest, "a.bin") == SMALL["a.bin"]
    assert other.path(manifest, "deep/b.json").read_bytes() == b"{}"
    assert content_of(other.open(KEY)) == SMALL


def test_an_artifact_has_the_same_hash_inlined_or_not(artifacts: Artifacts) -> None:
    separate = publish(artifacts, "pack/other", **SMALL)
    assert not separate.is_inlined
    assert publish_small(artifacts).sha256 == separate.sha256


def test_a_damaged_copy_of_an_inlined_file_is_replaced(artifacts: Artifacts, damage: Damage) -> None:
    manifest = publish_small(artifacts, a=bytes(1000))
    damage(artifacts.path(manifest, "a"))
    assert content_of(artifacts.open(KEY)) == {"a": bytes(1000)}


def test_a_copy_that_a_power_cut_emptied_is_replaced_before_it_is_read(artifacts: Artifacts) -> None:
    manifest = publish_small(artifacts, a=bytes(1000))
    artifacts.path(manifest, "a").write_bytes(b"")
    assert artifacts.path(manifest, "a").read_bytes() == bytes(1000)


def test_one_of_many_concurrent_small_attempts_is_published(artifacts: Artifacts) -> None:
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
    assert not files_below(artifacts.root)


# --- what garbage collection uses ---


def test_an_unpublished_artifact_is_gone_and_can_be_published_again(artifacts: Artifacts) -> None:
    publish(artifacts)
    publish(artifacts, "pack/other")
    before = {file.path for file in artifacts.files()}
    artifacts.unpublish([KEY, "pack/unknown"])
    assert artifacts.manifest(KEY) is None
    assert artifacts.keys("pack") == ["pack/other"]
    remaining = {file.path for file in artifacts.files()}
    assert before - remaining == {f"{KEY}/{MANIFEST}"}
    artifacts.remove_files([path for path in remaining if path.startswith(KEY)])
    assert {file.path for file in artifacts.files()} == {
        path for path in before if path.startswith("pack/other")
    }
    publish(artifacts)
    assert content_of(artifacts.open(KEY)) == FILES
    assert content_of(artifacts.open("pack/other")) == FILES


def test_files_are_listed_with_sizes_and_times(artifacts: Artifacts) -> None:
    started = time.time()
    publish(artifacts)
    sizes = {file.path.rpartition("/")[2]: file.bytes for file in artifacts.files()}
    assert sizes.pop(MANIFEST) > 100
    assert sizes == {"a.bin": 1000, "b.json": 2, "empty": 0}
    assert all(started - 2 < file.modified < time.time() + 2 for file in artifacts.files())


def test_removing_missing_files_is_not_an_error(artifacts: Artifacts) -> None:
    artifacts.remove_files(["pack/unknown/w-0123456789ab/a"])
