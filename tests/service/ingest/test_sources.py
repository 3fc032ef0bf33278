"""Bodies named by a URI: files under the import roots can be read, and no others."""

import os
from pathlib import Path

import pytest

from service.core.errors import InvalidRequest
from service.ingest.sources import open_uri


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "imports"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a file#1.ndjson").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    return root


def refusal(uri: str, *roots: Path) -> str:
    with pytest.raises(InvalidRequest) as raised:
        open_uri(uri, roots)
    return raised.value.detail


def test_a_file_under_a_root_is_read_in_chunks(root: Path) -> None:
    uri = (root / "sub" / "a file#1.ndjson").as_uri()
    assert b"".join(open_uri(uri, [root.parent / "other", root])) == b"inside"
    assert b"".join(open_uri(uri.replace("file://", "file://localhost"), [root])) == b"inside"
    (root / "large").write_bytes(b"x" * (3 << 20))
    assert [len(chunk) for chunk in open_uri((root / "large").as_uri(), [root])] == [1 << 20] * 3


def test_files_outside_the_roots_and_missing_ones_get_the_same_error(root: Path) -> None:
    names = [
        "imports/../secret",
        "imports/%2e%2e/secret",
        "secret",
        "missing",
        "imports",
        "imports/sub",
        "a%00b",
    ]
    for name in names:
        uri = f"{root.parent.as_uri()}/{name}"
        assert refusal(uri, root) == f"{uri!r} is not a readable file under the import roots"
    sibling = root.parent / "imports-of-others"
    sibling.write_bytes(b"outside")
    assert "not a readable file" in refusal(sibling.as_uri(), root)


def test_a_pipe_is_refused_without_blocking(root: Path) -> None:
    os.mkfifo(root / "pipe")
    assert "not a readable file" in refusal((root / "pipe").as_uri(), root)


def test_a_file_that_becomes_a_link_before_it_is_read_is_not_followed(root: Path) -> None:
    path = root / "sub" / "a file#1.ndjson"
    chunks = open_uri(path.as_uri(), [root])
    path.unlink()
    path.symlink_to(root.parent / "secret")
    with pytest.raises(InvalidRequest, match="not a readable file"):
        list(chunks)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://bucket", "'s3://bucket' does not have the form s3://bucket/key"),
        ("s3:///key", "'s3:///key' does not have the form s3://bucket/key"),
        ("s3://bucket/key?version=1", "'s3://bucket/key?version=1' does not have the form s3://bucket/key"),
        (
            "https://example.org/a",
            "'https://example.org/a': only s3:// URIs, and file:// URIs under the import roots, can be read",
        ),
        (
            "/etc/passwd",
            "'/etc/passwd': only s3:// URIs, and file:// URIs under the import roots, can be read",
        ),
        ("file://host/a", "'file://host/a' does not have the form file:///path"),
        ("file:///a?b", "'file:///a?b' does not have the form file:///path"),
        ("file:///a#b", "'file:///a#b' does not have the form file:///path"),
        ("file:a", "'file:a' does not have the form file:///path"),
        ("file:///%ff", "'file:///%ff' is not a URI"),
        ("file://[", "'file://[' is not a URI"),
    ],
)
def test_other_uris_are_refused(root: Path, uri: str, reason: str) -> None:
    assert refusal(uri, root) == reason


def test_without_roots_nothing_is_read(root: Path) -> None:
    assert "PATHSWITCH_IMPORT_ROOTS is not set" in refusal((root / "sub" / "a file#1.ndjson").as_uri())
