"""Paths in requests: they are resolved, links included, and only those under an import root are accepted."""

from pathlib import Path

import pytest

from service.ingest.import_roots import resolve_under_roots


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "imports"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "file").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (tmp_path / "imports-of-others").mkdir()
    return root


def resolve(path: Path | str, *roots: Path) -> Path | None:
    return resolve_under_roots(str(path), roots)


def test_files_and_folders_under_a_root_are_accepted(root: Path) -> None:
    for path in (root, root / "sub", root / "sub" / "file"):
        assert resolve(path, root.parent / "other", root) == path.resolve()


def test_links_are_followed_if_they_end_under_a_root(root: Path) -> None:
    (root / "in").symlink_to(root / "sub" / "file")
    (root / "out").symlink_to(root.parent / "secret")
    (root.parent / "alias").symlink_to(root)
    inside = (root / "sub" / "file").resolve()
    assert resolve(root / "in", root) == inside
    assert resolve(root / "in", root.parent / "alias") == inside
    assert resolve(root.parent / "alias" / "sub" / "file", root) == inside
    assert resolve(root / "out", root) is None


def test_paths_outside_the_roots_or_without_a_file_are_not_accepted(root: Path) -> None:
    (root / "circle").symlink_to(root / "circle")
    outside = ["secret", "imports/../secret", "imports-of-others", "imports/sub/../../secret"]
    for name in [*outside, "missing", "imports/missing", "imports/circle", "imports/a\0b"]:
        assert resolve(f"{root.parent}/{name}", root) is None, name
    assert resolve(root) is None
