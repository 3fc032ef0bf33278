"""Every state a row can be in, what it means, and who moves it on. ``MOVES`` is the one table of legal moves."""

from collections.abc import Mapping
from enum import StrEnum


class UpdateState(StrEnum):
    PENDING = "pending"
    """Written with its data version. Waits until the model's earlier updates have ended; the orchestrator starts it."""
    RUNNING = "running"
    """Its stages are written, some have not ended. At most one a model. The last stage's end moves it on."""
    SUCCEEDED = "succeeded"
    """The gate passed, and the version is served, unless the model does not release by itself. Final."""
    REJECTED = "rejected"
    """Trained and measured, and the gate said no: what is served stays. Final."""
    FAILED = "failed"
    """A stage failed for good. A retry moves it back to running, from its last good stage."""
    CANCELLED = "cancelled"
    """Ended by a user, or by the exclusion of its data version. Final."""


class StageState(StrEnum):
    PENDING = "pending"
    """Needs stages that have not succeeded yet. The last of them to succeed makes it ready. Training stages that wait only
    for one another are claimed with the first of them, as one run."""
    READY = "ready"
    """May run once ``ready_at`` has come (a retry waits there). An orchestrator claims it."""
    RUNNING = "running"
    """Held under a lease by one orchestrator, which polls its run. An expired lease is taken over under a new epoch. A
    failed attempt goes back to ready; a branch whose trunk failed in the same run goes back to pending."""
    SUCCEEDED = "succeeded"
    """Its artifact is published (or its decision is written). Final, unless a stage that reads it finds it damaged."""
    FAILED = "failed"
    """Out of attempts, or not worth another. A retry of the update makes it ready again."""
    CANCELLED = "cancelled"
    """Its update ended before it could. Final unless the update failed and is retried."""


class ModelVersionState(StrEnum):
    CANDIDATE = "candidate"
    """Exported and evaluated; not served, or not yet."""
    REJECTED = "rejected"
    """The gate said no. A user may still release it."""
    RELEASED = "released"
    """Every replica answers with it. At most one a model."""
    RETIRED = "retired"
    """Was released, until another version was."""


class ReleaseState(StrEnum):
    PENDING = "pending"
    """Asked for: being loaded, on trial, or not yet what all replicas answer with. At most one a model."""
    LIVE = "live"
    """Every replica answers with it. At most one a model."""
    ENDED = "ended"
    """Was live until another release was. Final."""
    SUPERSEDED = "superseded"
    """A later request came before it was live. Final."""
    FAILED = "failed"
    """It was not loaded, or did not stand its trial; the replicas kept what they had. Final."""


class CheckpointState(StrEnum):
    LIVE = "live"
    """On the trunk's present lineage."""
    ABANDONED = "abandoned"
    """Lies after a point that the trunk was rewound to."""


U, S, V, R = UpdateState, StageState, ModelVersionState, ReleaseState

MOVES: Mapping[type[StrEnum], Mapping[StrEnum, frozenset[StrEnum]]] = {
    UpdateState: {
        U.PENDING: frozenset({U.RUNNING, U.CANCELLED, U.FAILED}),
        U.RUNNING: frozenset({U.SUCCEEDED, U.REJECTED, U.FAILED, U.CANCELLED}),
        U.SUCCEEDED: frozenset(),
        U.REJECTED: frozenset(),
        U.FAILED: frozenset({U.RUNNING, U.PENDING, U.CANCELLED}),
        U.CANCELLED: frozenset(),
    },
    StageState: {
        S.PENDING: frozenset({S.READY, S.RUNNING, S.CANCELLED}),
        S.READY: frozenset({S.RUNNING, S.SUCCEEDED, S.CANCELLED}),
        S.RUNNING: frozenset({S.SUCCEEDED, S.READY, S.PENDING, S.FAILED, S.CANCELLED}),
        S.SUCCEEDED: frozenset({S.READY}),
        S.FAILED: frozenset({S.READY, S.CANCELLED}),
        S.CANCELLED: frozenset({S.PENDING, S.READY}),
    },
    ModelVersionState: {
        V.CANDIDATE: frozenset({V.RELEASED, V.REJECTED}),
        V.REJECTED: frozenset({V.RELEASED}),
        V.RELEASED: frozenset({V.RETIRED}),
        V.RETIRED: frozenset({V.RELEASED}),
    },
    ReleaseState: {
        R.PENDING: frozenset({R.LIVE, R.SUPERSEDED, R.FAILED}),
        R.LIVE: frozenset({R.ENDED}),
        R.ENDED: frozenset(),
        R.SUPERSEDED: frozenset(),
        R.FAILED: frozenset(),
    },
    CheckpointState: {
        CheckpointState.LIVE: frozenset({CheckpointState.ABANDONED}),
        CheckpointState.ABANDONED: frozenset({CheckpointState.LIVE}),
    },
}

# States that carry ``finished_at``; the tables check that it is set in these and in no other.
FINISHED_UPDATES = frozenset({U.SUCCEEDED, U.REJECTED, U.FAILED, U.CANCELLED})
FINISHED_STAGES = frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED})


def sources(target: StrEnum) -> frozenset[StrEnum]:
    """The states from which ``target`` may be reached: what a guarded UPDATE names in its WHERE."""
    return frozenset(state for state, targets in MOVES[type(target)].items() if target in targets)
