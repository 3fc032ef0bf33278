"""Content-addressed artifacts: immutable folders of files, each under a key and published by a manifest of hashes.

An artifact exists once its manifest exists. Every attempt writes into a directory of its own; its files are synced first,
and the manifest is written last, by a write that fails if one is already there. The loser of a race therefore adopts the
winner's manifest, and no reader ever sees half an artifact. Opening an artifact verifies sizes and hashes.

    <root>/<key>/manifest.json        {"key", "directory", "files": [{"path","sha256","bytes"}], "result"}
    <root>/<key>/<attempt>/<files>

An object store uses the same layout below its prefix. A manifest may carry small files itself ("content", base64), so
that publishing them takes one write.

base.py          Artifacts, the interface, and the code that both implementations share
local.py         LocalArtifacts: a folder
s3.py            S3Artifacts: an object store, with a local cache of files
object_store.py  a prefix of an S3 bucket
cache.py         the size limit of that cache
layout.py        the paths in the diagram above
files.py         hash, verify and sync files
disk_space.py    a full disk raises DiskFull
garbage.py       removes artifacts that no row needs
"""

from pathlib import Path
from urllib.parse import unquote, urlparse

from service.artifacts.base import Artifacts
from service.artifacts.local import LocalArtifacts
from service.artifacts.s3 import S3Artifacts

__all__ = ["Artifacts", "LocalArtifacts", "S3Artifacts", "open_artifacts"]


def open_artifacts(url: str) -> Artifacts:
    """Open ``file:///path`` or ``s3://bucket/prefix#cache=/path``, where ``&max_bytes=`` limits the cache.

    Raises ValueError for any other URL.
    """
    parsed = urlparse(url)
    if parsed.scheme == "file":
        return LocalArtifacts(Path(unquote(parsed.path)))
    if parsed.scheme == "s3":
        return S3Artifacts.from_url(url)
    raise ValueError(f"artifacts URL {url!r}: use file:///path or s3://bucket/prefix")
