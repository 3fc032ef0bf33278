"""Data versions that are ready at the same time are written down in one transaction, each under its dataset's next number."""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy.orm import Session

from service.group_commit import GroupCommit
from service.ingest.hash_memory import Remembered, VersionHashes
from service.ingest.ingest import Ingest, Ingested
from service.known_documents import KnownDocuments
from service.store import datasets, events, models, updates
from service.store.columns import new_id
from service.store.database import CommitGuard, Database, commit_guard
from service.store.datasets import Extent, Standing
from service.store.in_use import share_artifacts
from service.store.tables import DataVersion

_MAX_STANDING = 1000


@dataclass(frozen=True)
class RegisteredVersion:
    """``created`` is False where the dataset had the same content already. ``updates``: ids, oldest first."""

    row: DataVersion
    created: bool
    updates: list[str]


@dataclass(frozen=True)
class Candidate:
    """What was published for a dataset that stands there. ``hashes``: of its documents, where they are few."""

    dataset: str
    stands: Standing
    label: str | None
    ingest: Ingest
    ingested: Ingested
    hashes: list[bytes] | None
    guard: CommitGuard | None

    def has_any(self, digests: Collection[bytes]) -> bool:
        """Whether one of its documents has one of the hashes."""
        if self.hashes is not None:
            return any(digest in digests for digest in self.hashes)
        with self.ingest.published_hashes(self.ingested) as hashes:
            return bool(hashes.among(sorted(digests)))

    def has_any_since(self, remembered: Remembered, after: int) -> bool:
        """Whether one of its documents is one that a version above ``after`` was the first to have."""
        if self.hashes is not None:
            return remembered.has_since(after, self.hashes)
        return self.has_any(remembered.since(after))

    @property
    def dataset_id(self) -> str:
        return self.stands.dataset_id

    @property
    def content(self) -> tuple[str, str]:
        return self.dataset_id, self.ingested.sha256


class VersionRounds:
    """Writes down what was published, if what that was worked out from still holds."""

    def __init__(self, database: Database, known: KnownDocuments) -> None:
        self._database = database
        self._known = known
        self._rounds = GroupCommit(self._write)
        self._left: dict[str, Standing] = {}

    def write(self, candidate: Candidate) -> RegisteredVersion | None:
        """None where the dataset stands elsewhere by now, and the candidate has to be worked out again."""
        return self._rounds.do(candidate)

    def left(self, name: str) -> Standing | None:
        """Where the last round left a dataset without given slices, if that is known: it may stand elsewhere by now."""
        return self._left.get(name)

    def _write(self, candidates: Sequence[Candidate]) -> list[RegisteredVersion | None]:
        """Write down those whose division still holds; None for the others."""
        with self._database.transaction() as session:
            dataset_ids = {candidate.dataset_id for candidate in candidates}
            datasets.lock_all(session, dataset_ids)
            places = {key: _Place(extent) for key, extent in datasets.extents(session, dataset_ids).items()}
            present = share_artifacts(session)
            there = found(session, {candidate.content for candidate in candidates})
            created: list[tuple[Candidate, RegisteredVersion]] = []
            outcomes: list[RegisteredVersion | None] = []
            for candidate in candidates:
                outcome = there.get(candidate.content)
                place = places[candidate.dataset_id]
                if outcome is None and self._holds(session, candidate, place):
                    outcome = RegisteredVersion(_row(candidate, place.take(candidate)), True, [])
                    created.append((candidate, outcome))
                    there[candidate.content] = replace(outcome, created=False)
                outcomes.append(outcome)
            _add(session, created, present)
            commit_guard.set(_Guards.of(candidates, outcomes))
        for candidate, outcome in created:
            version = VersionHashes(outcome.row.number, outcome.row.artifact_key, candidate.hashes)
            extent = places[candidate.dataset_id].extent._replace(newest=version.number)
            self._known.add(candidate.dataset_id, extent, version)
            self._leave(candidate, extent)
        return outcomes

    def _leave(self, candidate: Candidate, extent: Extent) -> None:
        if len(self._left) >= _MAX_STANDING:
            self._left.clear()
        if extent.slices:
            self._left.pop(candidate.dataset, None)
        else:
            self._left[candidate.dataset] = candidate.stands._replace(extent=extent)

    def _holds(self, session: Session, candidate: Candidate, place: "_Place") -> bool:
        """Whether what was worked out and published for a candidate is still right, and there."""
        # It may have been found rather than written: left by a registration that died, and collected meanwhile.
        return self._divides_alike(session, candidate, place) and candidate.ingest.has(candidate.ingested)

    def _divides_alike(self, session: Session, candidate: Candidate, place: "_Place") -> bool:
        """Whether nothing was added to the dataset, or only small versions that have none of these documents."""
        known, present = candidate.stands.extent, place.extent
        if known == present and not place.taken:
            return True
        if place.hashes is None or known[1:] != present[1:]:
            return False
        if place.hashes and candidate.has_any(place.hashes):
            return False
        if known == present:
            return True
        remembered = self._known.at_hand(session, candidate.dataset_id, present)
        return (
            remembered is not None
            and all(number <= known.newest for number, _ in remembered.others)
            and not candidate.has_any_since(remembered, known.newest)
        )


class _Guards:
    """The guards of all requests of a round: they share its transaction, so any of them can tell whether it was committed."""

    def __init__(self, guards: Sequence[CommitGuard]) -> None:
        self._guards = guards

    @classmethod
    def of(
        cls, candidates: Sequence[Candidate], outcomes: Sequence[RegisteredVersion | None]
    ) -> "_Guards | None":
        pairs = zip(candidates, outcomes, strict=True)
        guards = [each.guard for each, outcome in pairs if each.guard is not None and outcome is not None]
        return cls(guards) if guards else None

    def __call__(self, session: Session) -> None:
        with ExitStack() as undone:
            for guard in self._guards:
                guard(session)
                undone.callback(guard.forget)
            undone.pop_all()

    def forget(self) -> None:
        for guard in self._guards:
            guard.forget()

    def was_committed(self, session: Session) -> bool:
        return any(guard.was_committed(session) for guard in self._guards)


class _Place:
    """Where the next version of a dataset goes, in a round. ``hashes``: of what the round has added; None for too many."""

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.taken = 0
        self.hashes: set[bytes] | None = set()

    def take(self, candidate: Candidate) -> int:
        """The number of the candidate's version."""
        self.taken += 1
        if candidate.hashes is None:
            self.hashes = None
        elif self.hashes is not None:
            self.hashes.update(candidate.hashes)
        return self.extent.newest + self.taken


def found(
    session: Session, contents: Collection[tuple[str, str]]
) -> dict[tuple[str, str], RegisteredVersion]:
    """What is registered of these contents."""
    rows = datasets.versions_by_sha256(session, contents)
    update_ids = updates.ids_by_data_version(session, [row.id for row in rows.values()]) if rows else {}
    return {
        content: RegisteredVersion(row, False, update_ids.get(row.id, [])) for content, row in rows.items()
    }


def _row(candidate: Candidate, number: int) -> DataVersion:
    ingested = candidate.ingested
    return DataVersion(
        id=new_id("dv"),
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


def _add(session: Session, created: Sequence[tuple[Candidate, RegisteredVersion]], present: datetime) -> None:
    """Add the rows, their events and their updates."""
    if not created:
        return
    for _, outcome in created:
        outcome.row.created_at = present
    datasets.add_versions(session, [outcome.row for _, outcome in created])
    followers = models.following(session, {candidate.dataset_id for candidate, _ in created})
    for candidate, outcome in created:
        row, name = outcome.row, candidate.dataset
        events.append(session, "data_version.created", dataset=name, data_version=row.number, id=row.id)
        for model in followers.get(candidate.dataset_id, ()):
            outcome.updates.append(updates.add(session, model, row).id)
