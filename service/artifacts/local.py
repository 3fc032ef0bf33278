"""Artifacts in a local folder, or in one that several hosts share."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from service.artifacts.base import Artifacts
from service.artifacts.disk_space import translate_disk_full
from service.artifacts.files import remove_if_empty, sync_folder
from service.artifacts.layout import StoredFile, file_path, temporary_manifest_name
from service.core.errors import ArtifactCorrupt
from service.core.manifest import MANIFEST, FileEntry, Manifest


class LocalArtifacts(Artifacts):
    is_remote = False

    @property
    def url(self) -> str:
        return self.root.absolute().as_uri()

    def exists(self, key: str) -> bool:
        return os.path.exists(self._folder(key) / MANIFEST)

    def keys(self, prefix: str) -> list[str]:
        folder = self._folder(prefix)
        if not folder.is_dir():
            return []
        return sorted(f"{prefix}/{child.name}" for child in folder.iterdir() if (child / MANIFEST).is_file())

    def location(self, manifest: Manifest) -> str:
        return str(self._directory(manifest))

    def files(self) -> Iterator[StoredFile]:
        for folder, subfolders, names in os.walk(self.root):
            if Path(folder) == self.root:
                # Hidden folders hold unfinished uploads and runs, which remove their files themselves.
                subfolders[:] = [name for name in subfolders if not name.startswith(".")]
                continue
            for name in names:
                path = Path(folder, name)
                with suppress(FileNotFoundError):
                    status = path.stat()
                    yield StoredFile(path.relative_to(self.root).as_posix(), status.st_size, status.st_mtime)

    def unpublish(self, keys: Sequence[str]) -> None:
        super().unpublish(keys)
        for folder in {self._folder(key) for key in keys}:
            # Sync before any file is removed: a power cut must not bring back a manifest whose files are gone.
            if folder.is_dir():
                sync_folder(folder)

    def _read_manifest(self, key: str) -> bytes | None:
        try:
            return (self._folder(key) / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _publish_files(self, manifest: Manifest) -> bool:
        return self._link_manifest(manifest)

    def _publish_inlined(self, manifest: Manifest) -> bool:
        folder = self._folder(manifest.key)
        while True:
            with translate_disk_full(manifest.key):
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    return self._link_manifest(manifest)
                except FileNotFoundError:
                    continue  # garbage collection removed the folder while it was empty
                except BaseException:
                    remove_if_empty(folder)
                    raise

    def _link_manifest(self, manifest: Manifest) -> bool:
        """Write the manifest and link it into place. Returns False if there is a manifest already."""
        folder = self._folder(manifest.key)
        temporary = folder / temporary_manifest_name()
        try:
            with temporary.open("wb") as file:
                file.write(manifest.to_json())
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, folder / MANIFEST)
                created = True
            except FileExistsError:
                created = False
        finally:
            temporary.unlink(missing_ok=True)
        try:
            self._sync_up_to_root(folder)
        except OSError:
            if created and not manifest.is_inlined:
                # The attempt fails and its files are removed, so its manifest must go too.
                (folder / MANIFEST).unlink(missing_ok=True)
            raise
        return created

    def _sync_up_to_root(self, folder: Path) -> None:
        """Sync new parent folders so that they survive a power cut. Even the loser of a race syncs: the winner may not be done."""
        while folder != self.root.parent:
            sync_folder(folder)
            folder = folder.parent

    def _fetch(self, manifest: Manifest, entry: FileEntry) -> NoReturn:
        exists = (self.root / file_path(manifest, entry.path)).exists()
        problem = "differs from its manifest" if exists else "is missing"
        raise ArtifactCorrupt(f"{manifest.key}: {entry.path} {problem}")
