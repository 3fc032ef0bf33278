"""The document that says what an artifact is: ``artifacts.py`` has where it lies and when it counts."""

import builtins
import hashlib
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic_core import to_json

from service.core.errors import ArtifactMissing

MANIFEST = "manifest.json"

# Files of so many bytes in all may be in their manifest. What is that small is read at once, too.
SMALL_BYTES = 1 << 16


class FileEntry(BaseModel):
    """``content`` where the manifest has the file in itself."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    path: str
    sha256: str
    bytes: int
    content: builtins.bytes | None = None

    @classmethod
    def holding(cls, path: str, content: builtins.bytes) -> "FileEntry":
        return cls(path=path, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), content=content)


class Manifest(BaseModel):
    """What an artifact is: its files by hash, and the ``result`` its stage computed (plain JSON)."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    key: str
    directory: str
    files: tuple[FileEntry, ...]
    result: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def is_whole(self) -> bool:
        """Whether the manifest has all of the files in itself."""
        return all(file.content is not None for file in self.files)

    def file(self, path: str) -> FileEntry:
        """Raises ArtifactMissing."""
        entry = next((entry for entry in self.files if entry.path == path), None)
        if entry is None:
            raise ArtifactMissing(f"{self.key}: no file {path!r}")
        return entry

    @property
    def sha256(self) -> str:
        """Hash of the sorted file list: equal artifacts have equal hashes whatever the attempt was called."""
        lines = "".join(f"{f.sha256}  {f.path}\n" for f in sorted(self.files, key=lambda f: f.path))
        return hashlib.sha256(lines.encode()).hexdigest()

    def to_json(self) -> builtins.bytes:
        document = self.model_dump()
        for file in document["files"]:
            if file["content"] is None:
                del file["content"]
        return to_json(document, indent=1, bytes_mode="base64")
