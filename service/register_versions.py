"""Register data versions: write down ingested bodies as the next versions of their datasets.

Duplicates and holdout depend on the versions and slices that came before. They are worked out and published without
a lock, which may take minutes; the transaction that writes the row locks the dataset and looks whether what came before
is still the same. Where it is not, and a look at what was added does not show that it changes nothing, they are worked
out again: in every round somebody gets ahead. Rows that are ready at the same time are written in one transaction.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy.orm import Session

from service.artifacts import Artifacts
from service.core.errors import ArtifactMissing, NothingNew
from service.group_commit import GroupCommit
from service.ingest.documents import HASHES
from service.ingest.hash_memory import SMALL_DOCUMENTS, HashMemory, Remembered, VersionHashes
from service.ingest.hashfile import HashFile
from service.ingest.ingest import Body, Ingest, Ingested
from service.store import datasets, events, models, updates
from service.store.database import CommitGuard, Database, commit_guard, now
from service.store.datasets import Extent, Standing, VersionArtifact
from service.store.in_use import share_artifacts
from service.store.tables import DataVersion

# What is looked up while the dataset is locked.
_FEW_VERSIONS = 64

_MAX_STANDING = 1000


@dataclass(frozen=True)
class RegisteredVersion:
    """``created`` is False where the dataset had the same content already. ``updates``: ids, oldest first."""

    row: DataVersion
    created: bool
    updates: list[str]


@dataclass(frozen=True)
class _Candidate:
    """What was published for a dataset that stands there. ``hashes``: of its documents, where they are few."""

    dataset: str
    stands: Standing
    label: str | None
    ingest: Ingest
    ingested: Ingested
    hashes: list[bytes] | None
    guard: CommitGuard | None

    @property
    def dataset_id(self) -> str:
        return self.stands.dataset_id

    @property
    def content(self) -> tuple[str, str]:
        return self.dataset_id, self.ingested.sha256


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
        self._artifacts = artifacts
        self._memory = HashMemory()
        self._commits = GroupCommit(self._write)
        self._stands: dict[
            str, Standing
        ] = {}  # of datasets without given slices, as the last round left them

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
        stands = self._stands.get(name)
        if stands is None:
            return None
        return self._ground(
            stands, self._memory.remembered(stands.dataset_id, stands.extent.excluded, stands.extent.newest)
        )

    def _look(self, name: str, sha256: str) -> "_Ground | RegisteredVersion":
        """Where the dataset stands; or the content's row, where it has it. Raises NotFound."""
        while True:
            with self._database.reading() as session:
                # One snapshot: content that appears later must not make its own documents known ones.
                stands = datasets.standing(session, name, sha256)
                key, extent = stands.dataset_id, stands.extent
                if stands.is_there:
                    [found] = _found(session, [(key, sha256)]).values()
                    return found
                slices = datasets.given_slices(session, key) if extent.slices else ()
                after = self._memory.newest(key, extent.excluded)
                added = datasets.version_artifacts(session, key, after) if extent.newest > after else []
            remembered = self._remember(key, extent, after, added)
            given = tuple(self._folder(slice.artifact_key) for slice in slices)
            if (ground := self._ground(stands, remembered, given)) is not None:
                return ground

    def _ground(
        self, stands: Standing, remembered: Remembered | None, given: tuple[Path, ...] = ()
    ) -> "_Ground | None":
        if remembered is None:
            return None
        earlier = tuple(self._folder(key) for _, key in remembered.others)
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
        candidate = _Candidate(
            name, ground.stands, label, ingest, ingested, ingest.hashes(), commit_guard.get()
        )
        return self._commits.do(candidate)

    def _write(self, candidates: Sequence[_Candidate]) -> list[RegisteredVersion | None]:
        """Write down those whose division still holds; None for the others."""
        with self._database.transaction() as session:
            dataset_ids = {candidate.dataset_id for candidate in candidates}
            datasets.lock_all(session, dataset_ids)
            places = {key: _Place(extent) for key, extent in datasets.extents(session, dataset_ids).items()}
            share_artifacts(session)
            there = _found(session, {candidate.content for candidate in candidates})
            created: list[tuple[_Candidate, RegisteredVersion]] = []
            outcomes: list[RegisteredVersion | None] = []
            for candidate in candidates:
                outcome = there.get(candidate.content)
                place = places[candidate.dataset_id]
                if outcome is None and self._holds(session, candidate, place):
                    outcome = RegisteredVersion(_row(candidate, place.take(candidate)), True, [])
                    created.append((candidate, outcome))
                    there[candidate.content] = replace(outcome, created=False)
                outcomes.append(outcome)
            _add(session, created)
            commit_guard.set(_Guards.of(candidates, outcomes))
        for candidate, outcome in created:
            number, key = outcome.row.number, outcome.row.artifact_key
            excluded = places[candidate.dataset_id].extent.excluded
            version = VersionHashes(number, key, candidate.hashes)
            self._memory.add(candidate.dataset_id, excluded, number - 1, number, [version])
            self._leave(candidate, Extent(number, *places[candidate.dataset_id].extent[1:]))
        return outcomes

    def _leave(self, candidate: _Candidate, extent: Extent) -> None:
        if len(self._stands) >= _MAX_STANDING:
            self._stands.clear()
        if not extent.slices:
            self._stands[candidate.dataset] = candidate.stands._replace(extent=extent)

    def _holds(self, session: Session, candidate: _Candidate, place: "_Place") -> bool:
        """Whether what was worked out and published for a candidate is still right, and there."""
        # It may have been found rather than written: left by a registration that died, and collected meanwhile.
        return self._divides_alike(session, candidate, place) and candidate.ingest.has(candidate.ingested)

    def _divides_alike(self, session: Session, candidate: _Candidate, place: "_Place") -> bool:
        """Whether nothing was added to the dataset, or only small versions that have none of these documents."""
        known, present = candidate.stands.extent, place.extent
        if known == present and not place.taken:
            return True
        if candidate.hashes is None or place.hashes is None or known[1:] != present[1:]:
            return False
        if not place.hashes.isdisjoint(candidate.hashes):
            return False
        if known == present:
            return True
        remembered = self._at_hand(session, candidate.dataset_id, present)
        return (
            remembered is not None
            and all(number <= known.newest for number, _ in remembered.others)
            and not remembered.has_since(known.newest, candidate.hashes)
        )

    def _at_hand(self, session: Session, dataset_id: str, extent: Extent) -> Remembered | None:
        """What the versions of a dataset have, where it can be told while the dataset is locked."""
        after = self._memory.newest(dataset_id, extent.excluded)
        if after >= extent.newest:
            return self._memory.remembered(dataset_id, extent.excluded, extent.newest)
        if self._artifacts.is_remote or extent.newest - after > _FEW_VERSIONS:
            return None
        return self._remember(
            dataset_id, extent, after, datasets.version_artifacts(session, dataset_id, after)
        )

    def _remember(
        self, dataset_id: str, extent: Extent, after: int, added: Sequence[VersionArtifact]
    ) -> Remembered | None:
        """Read what was added to a dataset above ``after``. None where others were faster, or have excluded a version."""
        versions = [VersionHashes(each.number, each.key, self._few_hashes(each)) for each in added]
        self._memory.add(dataset_id, extent.excluded, after, extent.newest, versions)
        return self._memory.remembered(dataset_id, extent.excluded, extent.newest)

    def _few_hashes(self, version: VersionArtifact) -> list[bytes] | None:
        if version.documents > SMALL_DOCUMENTS:
            return None
        with HashFile(self._folder(version.key) / HASHES) as hashes:
            return list(hashes)

    def _folder(self, key: str) -> Path:
        # Not verified: that would read all data that the dataset has. Whoever packs it verifies it.
        manifest = self._artifacts.manifest(key)
        if manifest is None:
            raise ArtifactMissing(f"{key}: no such artifact")
        return self._artifacts.path(manifest, HASHES).parent


class _Guards:
    """The guards of all requests of a round: they share its transaction, so any of them can tell whether it was committed."""

    def __init__(self, guards: Sequence[CommitGuard]) -> None:
        self._guards = guards

    @classmethod
    def of(
        cls, candidates: Sequence[_Candidate], outcomes: Sequence[RegisteredVersion | None]
    ) -> "_Guards | None":
        pairs = zip(candidates, outcomes, strict=True)
        guards = [each.guard for each, outcome in pairs if each.guard is not None and outcome is not None]
        return cls(guards) if guards else None

    def __call__(self, session: Session) -> None:
        for guard in self._guards:
            guard(session)

    def was_committed(self, session: Session) -> bool:
        return any(guard.was_committed(session) for guard in self._guards)


class _Place:
    """Where the next version of a dataset goes, in a round. ``hashes``: of what the round has added; None for too many."""

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.taken = 0
        self.hashes: set[bytes] | None = set()

    def take(self, candidate: _Candidate) -> int:
        """The number of the candidate's version."""
        self.taken += 1
        if candidate.hashes is None:
            self.hashes = None
        elif self.hashes is not None:
            self.hashes.update(candidate.hashes)
        return self.extent.newest + self.taken


def _found(
    session: Session, contents: Collection[tuple[str, str]]
) -> dict[tuple[str, str], RegisteredVersion]:
    """What is registered of these contents."""
    rows = datasets.versions_by_sha256(session, contents)
    update_ids = updates.ids_by_data_version(session, [row.id for row in rows.values()]) if rows else {}
    return {
        content: RegisteredVersion(row, False, update_ids.get(row.id, [])) for content, row in rows.items()
    }


def _row(candidate: _Candidate, number: int) -> DataVersion:
    ingested = candidate.ingested
    return DataVersion(
        dataset_id=candidate.dataset_id,
        number=number,
        label=candidate.label,
        sha256=ingested.sha256,
        bytes=ingested.bytes,
        documents=ingested.documents,
        duplicates=ingested.duplicates,
        holdout_documents=ingested.holdout_documents,
        artifact_key=ingested.manifest.key,
    )


def _add(session: Session, created: Sequence[tuple[_Candidate, RegisteredVersion]]) -> None:
    """Add the rows, their events and their updates."""
    present = now(session)
    for _, outcome in created:
        outcome.row.created_at = present
        session.add(outcome.row)
    session.flush()
    followers = models.following(session, {candidate.dataset_id for candidate, _ in created})
    for candidate, outcome in created:
        row, name = outcome.row, candidate.dataset
        events.append(session, "data_version.created", dataset=name, data_version=row.number, id=row.id)
        for model in followers.get(candidate.dataset_id, ()):
            outcome.updates.append(updates.add(session, model, row).id)
