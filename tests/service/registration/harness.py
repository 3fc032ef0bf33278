"""What one process of the control plane has of its own, and short ways to register texts with it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from service.artifacts import Artifacts, LocalArtifacts
from service.core.artifact_files import HOLDOUT
from service.ingest.formats import DataFormat
from service.ingest.ingest import Ingest, Ingested
from service.ingest.reading import read_documents
from service.operations.exclusion import exclude_version
from service.registration.data_versions import register_version
from service.registration.hash_cache import HashCache
from service.registration.slices import RegisteredSlice, register_slice
from service.store.database import Database
from service.store.tables import DataVersion
from tests.support.control_plane import ndjson

HOLDOUT_FRACTION = 0.25


@dataclass(frozen=True)
class Registered:
    """A registered body. ``published`` are the artifact keys it was published under, one per split."""

    texts: tuple[str, ...]
    row: DataVersion
    created: bool
    updates: list[str]
    published: list[str]


class InterruptedIngest(Ingest):
    """Records what it publishes, and calls one of ``meanwhile`` after each publication."""

    def __init__(self, artifacts: Artifacts, *meanwhile: Callable[[], object]) -> None:
        super().__init__(artifacts, DataFormat.NDJSON)
        self.published: list[str] = []
        self._meanwhile = list(meanwhile)

    def publish_version(self, *args: Any, **kwargs: Any) -> Ingested:
        return self._interrupt(super().publish_version(*args, **kwargs))

    def publish_slice(self) -> Ingested:
        return self._interrupt(super().publish_slice())

    def _interrupt(self, ingested: Ingested) -> Ingested:
        self.published.append(ingested.manifest.key)
        if self._meanwhile:
            self._meanwhile.pop(0)()
        return ingested


class Process:
    """Processes with one database URL and one artifact root work on the same dataset ``d``."""

    def __init__(self, database: Database, root: Path) -> None:
        self.database = database
        self.artifacts = LocalArtifacts(root)
        self.cache = HashCache(self.artifacts)

    def register(
        self, *texts: str, label: str | None = None, meanwhile: tuple[Callable[[], object], ...] = ()
    ) -> Registered:
        """Register a data version. Calls one of ``meanwhile`` per attempt, before the row is written."""
        with InterruptedIngest(self.artifacts, *meanwhile) as ingest:
            ingest.feed(ndjson(*texts))
            registered = register_version(self.database, self.cache, "d", ingest, ingest.end(), label=label)
            return Registered(texts, registered.row, registered.created, registered.updates, ingest.published)

    def upload_slice(
        self,
        name: str,
        *texts: str,
        data_version: int | None = None,
        meanwhile: tuple[Callable[[], object], ...] = (),
    ) -> RegisteredSlice:
        """Register an uploaded evaluation set."""
        with InterruptedIngest(self.artifacts, *meanwhile) as ingest:
            ingest.feed(ndjson(*texts))
            ingest.end()
            return register_slice(self.database, "d", ingest, name=name, data_version=data_version)

    def exclude(self, number: int) -> None:
        exclude_version(self.database, "d", number, "a mirror")

    def held_out(self, row: DataVersion) -> set[str]:
        folder = self.artifacts.open(row.artifact_key)
        return {document.text for document in read_documents(folder, HOLDOUT)}

    def count(self, table: Any) -> int:
        with self.database.reading() as session:
            return session.scalar(sa.select(sa.func.count()).select_from(table)) or 0
