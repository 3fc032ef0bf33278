"""Where an artifact's manifest and files lie: paths relative to the root folder or to the object store's prefix."""

import re
import uuid
from dataclasses import dataclass

from service.core.manifest import MANIFEST, Manifest

_ATTEMPT_DIRECTORY = re.compile(r"w-[0-9a-f]{12}")


@dataclass(frozen=True)
class StoredFile:
    """A file or object and its path. ``modified`` is in seconds since the epoch, by the store's clock."""

    path: str
    bytes: int
    modified: float


def new_attempt_directory() -> str:
    """A unique directory name for the files of one attempt."""
    return f"w-{uuid.uuid4().hex[:12]}"


def is_attempt_directory(name: str) -> bool:
    return _ATTEMPT_DIRECTORY.fullmatch(name) is not None


def check_key(key: str) -> None:
    """Raise ValueError unless ``key`` is a relative POSIX path without dot segments."""
    if any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"not an artifact key: {key!r}")


def manifest_path(key: str) -> str:
    return f"{key}/{MANIFEST}"


def directory_path(manifest: Manifest) -> str:
    return f"{manifest.key}/{manifest.directory}"


def file_path(manifest: Manifest, name: str) -> str:
    return f"{manifest.key}/{manifest.directory}/{name}"


def temporary_manifest_name() -> str:
    """The name that a manifest is written under before it is linked into place."""
    return f".{MANIFEST}-{uuid.uuid4().hex}"


def split_path(path: str) -> tuple[str, str | None] | None:
    """The key that a stored file belongs to, and the attempt that wrote it: None for the manifest itself.

    An unlinked temporary manifest counts as an attempt of its own. Returns None for a file outside this layout.
    """
    parts = path.split("/")
    for position, part in enumerate(parts):
        if is_attempt_directory(part):
            return "/".join(parts[:position]), part
    key, name = "/".join(parts[:-1]), parts[-1]
    if name == MANIFEST:
        return key, None
    if name.startswith(f".{MANIFEST}-"):
        return key, name
    return None
