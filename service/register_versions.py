"""Register data versions: write down ingested bodies as the next versions of their datasets.

Duplicates and holdout depend on the versions and slices that came before. They are worked out and published without
a lock, which may take minutes; the transaction that writes the row locks the dataset and looks whether what came before
is still the same. Where it is not, and a look at what was added does not show that it changes nothing, they are worked
out again: in every round somebody gets ahead. Rows that are ready at the same time are written in one transaction.
"""

from dataclasses import dataclass
from pathlib import Path

from service.artifacts import Artifacts
from service.core.errors import NothingNew
from service.ingest.hash_memory import SMALL_DOCUMENTS, Remembered
from service.ingest.ingest import Body, Ingest
from service.known_documents import KnownDocuments
from service.store import datasets
from service.store.database import Database, commit_guard
from service.store.datasets import Standing
from service.version_rounds import Candidate, RegisteredVersion, VersionRounds, found


@dataclass(frozen=True)
class _Ground:
    """What a body is divided by: the dataset's small versions in memory, the folders of the others, and the given slices."""

    stands: Standing
    remembered: Remembered
    earlier: tuple[Path, ...]
    given: tuple[Path, ...]


class VersionRegistrar:
    """One for a process, and for all of its threads."""

    def __init__(self, database: Database, artifacts: Artifacts) -> None:
        self._database = database
        self._known = KnownDocuments(artifacts)
        self._rounds = VersionRounds(database, self._known)

    def register(
        self, name: str, ingest: Ingest, body: Body, *, label: str | None = None
    ) -> RegisteredVersion:
        """Register a body that was ingested to its end, with a pending update of every model that follows.

        Raises NotFound for an unknown dataset, NothingNew where every document is known.
        """
        # Where small bodies follow each other, the last one has left where the dataset stands: a query less.
        left = self._left(name) if body.documents <= SMALL_DOCUMENTS else None
        while True:
            ground = left or self._look(name, body.sha256)
            if isinstance(ground, RegisteredVersion):
                return ground
            try:
                registered = self._register_on(ground, name, ingest, label)
            except NothingNew:
                if left is None:
                    raise
                registered = None  # it may be there already, which is no error
            if registered is not None:
                return registered
            left = None

    def _left(self, name: str) -> "_Ground | None":
        """Where the last round left the dataset, if that is known."""
        stands = self._rounds.left(name)
        return stands and self._ground(stands, self._known.now(stands.dataset_id, stands.extent))

    def _look(self, name: str, sha256: str) -> "_Ground | RegisteredVersion":
        """Where the dataset stands; or the content's row, where it has it. Raises NotFound."""
        while True:
            with self._database.reading() as session:
                # One snapshot: content that appears later must not make its own documents known ones.
                stands = datasets.standing(session, name, sha256)
                key, extent = stands.dataset_id, stands.extent
                if stands.is_there:
                    [registered] = found(session, [(key, sha256)]).values()
                    return registered
                slices = datasets.given_slices(session, key) if extent.slices else ()
                after = self._known.newest(key, extent)
                added = datasets.version_artifacts(session, key, after) if extent.newest > after else []
            remembered = self._known.with_added(key, extent, after, added)
            given = tuple(self._known.folder(slice.artifact_key) for slice in slices)
            if (ground := self._ground(stands, remembered, given)) is not None:
                return ground

    def _ground(
        self, stands: Standing, remembered: Remembered | None, given: tuple[Path, ...] = ()
    ) -> "_Ground | None":
        if remembered is None:
            return None
        earlier = tuple(self._known.folder(key) for _, key in remembered.others)
        return _Ground(stands, remembered, earlier, given)

    def _register_on(
        self, ground: "_Ground", name: str, ingest: Ingest, label: str | None
    ) -> RegisteredVersion | None:
        """Publish the body and write it down; None where the dataset stands elsewhere by now."""
        ingested = ingest.publish_version(
            earlier=ground.earlier,
            given=ground.given,
            holdout_fraction=ground.stands.holdout_fraction,
            remembered=ground.remembered,
        )
        candidate = Candidate(
            name, ground.stands, label, ingest, ingested, ingest.hashes(), commit_guard.get()
        )
        return self._rounds.write(candidate)
