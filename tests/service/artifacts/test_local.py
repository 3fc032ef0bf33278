"""Artifacts in a folder: damage is found before use, and no empty folders stay."""

import os
from pathlib import Path
from typing import Any

import pytest

from service.artifacts import LocalArtifacts
from service.core.errors import ArtifactCorrupt
from service.core.manifest import MANIFEST
from tests.service.artifacts.conftest import Damage
from tests.support.artifacts import KEY, publish


@pytest.fixture
def artifacts(tmp_path: Path) -> LocalArtifacts:
    return LocalArtifacts(tmp_path)


def test_a_damaged_file_is_found_before_it_is_used(artifacts: LocalArtifacts, damage: Damage) -> None:
    manifest = publish(artifacts)
    damage(artifacts.path(manifest, "a.bin"))
    with pytest.raises(ArtifactCorrupt, match=r"pack/3f9c: a\.bin"):
        artifacts.open(KEY)
    with pytest.raises(ArtifactCorrupt, match=r"pack/3f9c: a\.bin"):
        artifacts.read(manifest, "a.bin")


def test_the_error_says_whether_a_file_is_missing_or_changed(artifacts: LocalArtifacts) -> None:
    manifest = publish(artifacts)
    artifacts.path(manifest, "a.bin").write_bytes(b"b" * 1000)
    with pytest.raises(ArtifactCorrupt, match=r"a\.bin differs from its manifest"):
        artifacts.read(manifest, "a.bin")
    artifacts.path(manifest, "a.bin").unlink()
    with pytest.raises(ArtifactCorrupt, match=r"a\.bin is missing"):
        artifacts.read(manifest, "a.bin")


def test_an_unreadable_manifest_is_corrupt(artifacts: LocalArtifacts) -> None:
    publish(artifacts)
    (artifacts.root / KEY / MANIFEST).write_text('{"key": "pa')
    with pytest.raises(ArtifactCorrupt, match="unreadable manifest"):
        artifacts.manifest(KEY)


@pytest.mark.parametrize("part", ["content", "hash"])
def test_a_damaged_inlined_file_is_not_used(artifacts: LocalArtifacts, part: str) -> None:
    manifest = artifacts.publish_small(KEY, {"a": b"abcdef"}, {})
    path = artifacts.root / KEY / MANIFEST
    document = path.read_bytes()
    position = document.index(b"YWJj" if part == "content" else manifest.files[0].sha256.encode())
    replacement = b"Z" if part == "content" else b"!"
    path.write_bytes(document[:position] + replacement + document[position + 1 :])
    with pytest.raises(ArtifactCorrupt, match=r"pack/3f9c: a differs"):
        artifacts.open(KEY)


def test_a_small_artifact_survives_garbage_collection_at_the_same_moment(
    artifacts: LocalArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process removes the new folder while it is empty, and then the manifest of an earlier attempt."""
    make_folder, link = Path.mkdir, os.link
    interruptions = ["folder removed", "earlier manifest removed"]

    def mkdir(folder: Path, *args: Any, **options: Any) -> None:
        make_folder(folder, *args, **options)
        if folder == artifacts.root / KEY and interruptions[:1] == ["folder removed"]:
            interruptions.pop(0)
            folder.rmdir()

    def link_unless_interrupted(source: Path, target: Path) -> None:
        if interruptions:
            interruptions.pop(0)
            raise FileExistsError
        link(source, target)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(os, "link", link_unless_interrupted)
    manifest = artifacts.publish_small(KEY, {"a": b"abc"}, {})
    assert interruptions == []
    assert artifacts.manifest(KEY) == manifest


def test_empty_folders_go_with_their_last_file(artifacts: LocalArtifacts) -> None:
    publish(artifacts)
    artifacts.unpublish([KEY])
    artifacts.remove_files([file.path for file in artifacts.files()])
    assert list(artifacts.root.iterdir()) == []
