"""The states of rows: what each means, what moves a row on, and MOVES, the only table of legal moves."""

from collections.abc import Mapping
from enum import StrEnum


class UpdateState(StrEnum):
    """State of an update, which turns one data version into one model version."""

    PENDING = "pending"
    """Registering the data version wrote the update, or a user requested it. It waits until the model's
    earlier updates have ended. Then the orchestrator resolves the model line, writes the tokenizer and pack
    stages, and moves the update to running. If that fails with a permanent error, the update fails."""
    RUNNING = "running"
    """Its stages are written and not all of them have ended. A model has at most one running update. The
    transaction that records the end of its last stage moves it on."""
    SUCCEEDED = "succeeded"
    """The gate passed the version and, unless the model's ``auto_release`` is off, the version is live.
    Final."""
    REJECTED = "rejected"
    """The version was trained and evaluated, and the gate rejected it. The served version stays. Final."""
    FAILED = "failed"
    """A stage ran out of attempts or failed with an error that is never retried; ``error`` names the stage. A
    user can retry the update, which moves it back to running from its last good stage, or to pending if it
    has no stages yet."""
    CANCELLED = "cancelled"
    """A user cancelled it or excluded its data version. Artifacts that it published stay, and the next update
    continues from them. Final."""


class StageState(StrEnum):
    """State of a stage, one node of an update. A stage that is held has an owner, a lease and an epoch."""

    PENDING = "pending"
    """Some of the stages that it needs have not succeeded. The transaction that records the last of them
    makes it ready. A training stage whose only need is the previous training stage is claimed together with
    it, as one run."""
    READY = "ready"
    """Everything it needs has succeeded. An orchestrator claims it once ``ready_at`` has come; after a failed
    attempt that time lies in the future. If its artifact already exists, it succeeds at once, without a run."""
    RUNNING = "running"
    """One orchestrator holds it under a lease and polls its run. When the lease expires, another orchestrator
    takes it over under a new epoch. A failed attempt moves it back to ready. If the stage before it in the
    same run failed, it moves back to pending, and the attempt does not count."""
    SUCCEEDED = "succeeded"
    """Its artifact is published, or its decision is recorded. Final, unless a stage that reads the artifact
    finds it damaged: then it becomes ready again and makes the artifact once more."""
    FAILED = "failed"
    """It ran out of attempts, or its error is never retried. Its update fails with it. Retrying the update
    makes it ready again with a fresh number of attempts."""
    CANCELLED = "cancelled"
    """Its update ended before it did. The orchestrator ends its run. If the update failed, a retry makes the
    stage pending or ready again; otherwise final."""


class ModelVersionState(StrEnum):
    """State of a model version, a finished, exported and evaluated branch."""

    CANDIDATE = "candidate"
    """Exported and evaluated, and not served. The gate judges it; if it passes, a release serves it."""
    REJECTED = "rejected"
    """The gate rejected it. A user may release it anyway."""
    RELEASED = "released"
    """Every replica answers with it. A model has at most one released version. The next release to go live
    retires it."""
    RETIRED = "retired"
    """It was released until another version was. A rollback releases it again."""


class ReleaseState(StrEnum):
    """State of a release, one line of the history of what a model served."""

    PENDING = "pending"
    """Requested by an update or a user: its version is being loaded, is on trial, or is not yet what every
    replica answers with. A model has at most one pending release. The orchestrator advances it according to
    the replicas' reports."""
    LIVE = "live"
    """Every replica answers with its version. A model has at most one live release. The next one to go live
    ends it."""
    ENDED = "ended"
    """It was live until another release was. Final."""
    SUPERSEDED = "superseded"
    """A later release was requested before it went live. Final."""
    FAILED = "failed"
    """Its version did not load in time or failed its trial; ``error`` says which. Replicas keep the version
    that they served. Final."""


class CheckpointState(StrEnum):
    """State of a trunk checkpoint."""

    LIVE = "live"
    """It is part of the trunk's current lineage, so the trunk and branches may continue from it."""
    ABANDONED = "abandoned"
    """The trunk was rewound to a step before it, because it has read a data version that was excluded later.
    Nothing continues from it any more. Final."""


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
        CheckpointState.ABANDONED: frozenset(),
    },
}

# States in which ``finished_at`` is set. The tables check that it is set in no other state.
FINISHED_UPDATES = frozenset({U.SUCCEEDED, U.REJECTED, U.FAILED, U.CANCELLED})
FINISHED_STAGES = frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED})


def sources(target: StrEnum) -> frozenset[StrEnum]:
    """The states from which a row may move to ``target``. A guarded UPDATE names them in its WHERE clause."""
    return frozenset(state for state, targets in MOVES[type(target)].items() if target in targets)
