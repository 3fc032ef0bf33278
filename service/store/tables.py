"""Every table. CHECK constraints and partial unique indexes let the database itself reject invalid rows.

Times are UTC, from the database's clock. JSON columns hold documents that the specs of ``service.core`` validate.
"""

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from service.core import states
from service.core.retry import MAX_ATTEMPTS
from service.store.base import Base, finished_check, partial_index, state_check, unique_where
from service.store.columns import new_id


class Dataset(Base):
    """A named stream of documents that grows by data versions."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("ds"))
    name: Mapped[str] = mapped_column(unique=True)
    description: Mapped[str | None]
    holdout_fraction: Mapped[float]
    created_at: Mapped[datetime]


class DataVersion(Base):
    """One immutable increment of a dataset. ``sha256`` is of the decoded body. No plan reads an excluded data version."""

    __tablename__ = "data_versions"
    __table_args__ = (
        UniqueConstraint("dataset_id", "number"),
        UniqueConstraint("dataset_id", "sha256"),
        sa.CheckConstraint("(excluded_at IS NULL) = (excluded_reason IS NULL)", name="excluded"),
        # Every registration reads the few excluded versions of a dataset.
        partial_index("ix_data_versions_excluded", "dataset_id", where="excluded_at IS NOT NULL"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("dv"))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    number: Mapped[int]
    label: Mapped[str | None]
    sha256: Mapped[str]
    bytes: Mapped[int] = mapped_column(sa.BigInteger)
    documents: Mapped[int] = mapped_column(sa.BigInteger)
    duplicates: Mapped[int] = mapped_column(sa.BigInteger)
    holdout_documents: Mapped[int] = mapped_column(sa.BigInteger)
    artifact_key: Mapped[str]
    excluded_at: Mapped[datetime | None]
    excluded_reason: Mapped[str | None]
    created_at: Mapped[datetime]


class Slice(Base):
    """An uploaded evaluation set. The holdouts of data versions are slices too, but have no rows here."""

    __tablename__ = "slices"
    __table_args__ = (UniqueConstraint("dataset_id", "name"),)

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("sl"))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"))
    name: Mapped[str]
    data_version: Mapped[int | None]
    documents: Mapped[int] = mapped_column(sa.BigInteger)
    artifact_key: Mapped[str]
    created_at: Mapped[datetime]


class Model(Base):
    """A line of model versions. ``spec`` is its ModelSpec, ``line`` the LineSpec that its first update resolved."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("mdl"))
    name: Mapped[str] = mapped_column(unique=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"), index=True)
    spec: Mapped[dict[str, Any]]
    line: Mapped[dict[str, Any] | None]
    base_key: Mapped[str | None]  # artifact with the copied base checkpoint
    tokenizer_source_key: Mapped[str | None]  # artifact with the copied tokenizer.json
    created_at: Mapped[datetime]


class Update(Base):
    """The plan that turns one data version into one model version.

    ``planned``: the training stages and those after them are written too. A ``one_off`` update is not part of the
    line: no other update continues from it. ``branch_from`` is the checkpoint that a one-off branch leaves.
    """

    __tablename__ = "updates"
    __table_args__ = (
        state_check(states.UpdateState),
        finished_check(states.FINISHED_UPDATES),
        unique_where("uq_updates_running", "model_id", where="state = 'running'"),
        Index("ix_updates_state", "state"),
        Index("ix_updates_model_id_id", "model_id", "id"),  # a page of a model's updates, in order
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("upd"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    data_version_id: Mapped[str] = mapped_column(ForeignKey("data_versions.id"), index=True)
    paradigm: Mapped[dict[str, Any]]
    one_off: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    branch_from: Mapped[str | None] = mapped_column(ForeignKey("checkpoints.id"))
    state: Mapped[str] = mapped_column(default=states.UpdateState.PENDING)
    planned: Mapped[bool] = mapped_column(default=False)
    branch_point: Mapped[int | None]
    final_step: Mapped[int | None]
    notes: Mapped[dict[str, Any]] = mapped_column(default=dict)
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Stage(Base):
    """One node of an update, and its current attempt.

    ``attempt`` counts tries, ``epoch`` counts claims. Every write of an orchestrator is guarded by the epoch of its
    claim, and taking over an expired lease raises the epoch without a new attempt. ``run_id`` is set while that run may
    still be active.
    """

    __tablename__ = "stages"
    __table_args__ = (
        state_check(states.StageState),
        finished_check(states.FINISHED_STAGES),
        sa.CheckConstraint("(lease_until IS NOT NULL) = (state = 'running')", name="lease"),
        unique_where("uq_stages_running_key", "key", where="state = 'running' AND key IS NOT NULL"),
        UniqueConstraint("update_id", "name"),
        Index("ix_stages_state_ready_at", "state", "ready_at"),
        Index("ix_stages_run_id", "run_id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("stg"))
    update_id: Mapped[str] = mapped_column(ForeignKey("updates.id"))
    position: Mapped[int]
    name: Mapped[str]
    kind: Mapped[str]
    spec: Mapped[dict[str, Any]]
    key: Mapped[str | None]
    needs: Mapped[list[str]]  # ids of stages of the same update
    state: Mapped[str] = mapped_column(default=states.StageState.PENDING)
    attempt: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int] = mapped_column(default=MAX_ATTEMPTS)  # grows when a user retries the update
    epoch: Mapped[int] = mapped_column(default=0)
    owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    run_id: Mapped[str | None]
    ready_at: Mapped[datetime | None]
    reused: Mapped[bool] = mapped_column(default=False)
    progress: Mapped[dict[str, Any] | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    wasted_seconds: Mapped[float] = mapped_column(default=0.0)  # of failed attempts, wall-clock
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class MetricPoint(Base):
    """One optimizer step of a training stage. ``step`` is the global step of the line."""

    __tablename__ = "metric_points"

    stage_id: Mapped[str] = mapped_column(ForeignKey("stages.id"), primary_key=True)
    step: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    loss: Mapped[float]
    learning_rate: Mapped[float]
    grad_norm: Mapped[float]
    tokens_per_second: Mapped[float]


class Checkpoint(Base):
    """The trunk checkpoint at the end of an update's trunk segment."""

    __tablename__ = "checkpoints"
    __table_args__ = (state_check(states.CheckpointState), UniqueConstraint("model_id", "artifact_key"))

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("ckp"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    state: Mapped[str] = mapped_column(default=states.CheckpointState.LIVE)
    step: Mapped[int] = mapped_column(sa.BigInteger)
    data_version: Mapped[int]
    artifact_key: Mapped[str]
    sha256: Mapped[str]
    bytes: Mapped[int] = mapped_column(sa.BigInteger)
    created_at: Mapped[datetime]


class ModelVersion(Base):
    """A finished, exported, evaluated branch."""

    __tablename__ = "model_versions"
    __table_args__ = (
        state_check(states.ModelVersionState),
        UniqueConstraint("model_id", "number"),
        unique_where("uq_model_versions_released", "model_id", where="state = 'released'"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("mv"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    number: Mapped[int]
    data_version: Mapped[int]
    update_id: Mapped[str] = mapped_column(ForeignKey("updates.id"), unique=True)
    state: Mapped[str] = mapped_column(default=states.ModelVersionState.CANDIDATE)
    checkpoint_id: Mapped[str | None] = mapped_column(ForeignKey("checkpoints.id"))
    branch_point: Mapped[int] = mapped_column(sa.BigInteger)
    final_step: Mapped[int] = mapped_column(sa.BigInteger)
    parameters: Mapped[int] = mapped_column(sa.BigInteger)
    evaluations: Mapped[list[dict[str, Any]]]
    gate: Mapped[dict[str, Any] | None]
    cost: Mapped[dict[str, Any]]
    export_key: Mapped[str]
    created_at: Mapped[datetime]


class Release(Base):
    """A request to serve a model version, and later a line in the history of what was served.

    ``rollout`` is the RolloutSpec of the request; with None the version takes over as soon as it is loaded. On its way
    to live a release is begun (replicas load it), tried (every replica has it) and promoted (every replica should answer
    with it). ``trial`` holds the figures of the trial.
    """

    __tablename__ = "releases"
    __table_args__ = (
        state_check(states.ReleaseState),
        unique_where("uq_releases_pending", "model_id", where="state = 'pending'"),
        unique_where("uq_releases_live", "model_id", where="state = 'live'"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("rel"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    model_version_id: Mapped[str] = mapped_column(ForeignKey("model_versions.id"))
    state: Mapped[str] = mapped_column(default=states.ReleaseState.PENDING)
    by: Mapped[str]
    reason: Mapped[str | None]
    error: Mapped[str | None]
    rollout: Mapped[dict[str, Any] | None]
    trial: Mapped[dict[str, Any] | None]
    requested_at: Mapped[datetime]
    begun_at: Mapped[datetime | None]
    tried_at: Mapped[datetime | None]
    promoted_at: Mapped[datetime | None]
    released_at: Mapped[datetime | None]
    retired_at: Mapped[datetime | None]


class Observation(Base):
    """The latest reports of a model's replicas; ``replicas`` are ObservedReplicas."""

    __tablename__ = "observations"

    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)
    replicas: Mapped[list[dict[str, Any]]]
    observed_at: Mapped[datetime]


class Event(Base):
    """An entry of the event log, written in the transaction that caused it."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(
        sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True
    )
    type: Mapped[str]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class IdempotentRequest(Base):
    """A request with an Idempotency-Key, and its answer once there is one. ``target`` is method, path and query."""

    __tablename__ = "idempotent_requests"
    __table_args__ = (
        sa.CheckConstraint(
            "(status IS NULL) = (body IS NULL) AND (status IS NULL) = (request_sha256 IS NULL)", name="answer"
        ),
    )

    key: Mapped[str] = mapped_column(primary_key=True)
    target: Mapped[str]
    owner: Mapped[str]
    lease_until: Mapped[datetime]
    carried_out: Mapped[bool]
    request_sha256: Mapped[str | None]
    status: Mapped[int | None]
    media_type: Mapped[str | None]
    body: Mapped[bytes | None]
    created_at: Mapped[datetime] = mapped_column(index=True)
