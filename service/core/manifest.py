"""The manifest: the JSON document that describes an artifact. ``service.artifacts`` stores and publishes it."""

import builtins
import hashlib
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from service.core.errors import ArtifactMissing

MANIFEST = "manifest.json"

# Files of at most this many bytes in total may be inlined in their manifest. Smaller files are also hashed in one read.
SMALL_BYTES = 1 << 16


class FileEntry(BaseModel):
    """One file of an artifact. ``content`` is set if the manifest carries the file itself."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    path: str
    sha256: str
    bytes: int
    content: builtins.bytes | None = None

    @classmethod
    def inlined(cls, path: str, content: builtins.bytes) -> "FileEntry":
        return cls(path=path, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), content=content)


class Manifest(BaseModel):
    """An artifact's files with their hashes, and the ``result`` that its stage computed (plain JSON)."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    key: str
    directory: str
    files: tuple[FileEntry, ...]
    result: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def is_inlined(self) -> bool:
        """Whether the manifest carries all of the files itself."""
        return all(file.content is not None for file in self.files)

    def file(self, path: str) -> FileEntry:
        """The entry of one file. Raises ArtifactMissing."""
        entry = next((entry for entry in self.files if entry.path == path), None)
        if entry is None:
            raise ArtifactMissing(f"{self.key}: no file {path!r}")
        return entry

    @property
    def sha256(self) -> str:
        """Hash of the sorted file list: artifacts with equal files have equal hashes, whichever attempt wrote them."""
        lines = "".join(f"{f.sha256}  {f.path}\n" for f in sorted(self.files, key=lambda f: f.path))
        return hashlib.sha256(lines.encode()).hexdigest()

    def to_json(self) -> builtins.bytes:
        document = self.model_dump()
        for file in document["files"]:
            if file["content"] is None:
                del file["content"]
        return to_json(document, indent=1, bytes_mode="base64")
