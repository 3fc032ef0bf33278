"""Every table. The database refuses nonsense on its own: CHECKs and unique partial indexes stand beside the columns.

Times are UTC from the database's clock. JSON columns hold what ``service.core.specs`` validates. Names of tables and
columns are the words of the project.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy import ForeignKey, Index, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.core.retry import MAX_ATTEMPTS
from service.core.states import (
    FINISHED_STAGES,
    FINISHED_UPDATES,
    CheckpointState,
    ModelVersionState,
    ReleaseState,
    StageState,
    UpdateState,
)
from service.store.columns import Json, UtcDateTime, new_id


class Base(DeclarativeBase):
    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        datetime: UtcDateTime(),
        dict[str, Any]: Json,
        list[str]: Json,
        list[dict[str, Any]]: Json,
    }


def _state(enum: type[StrEnum]) -> sa.CheckConstraint:
    values = ", ".join(f"'{state}'" for state in enum)
    return sa.CheckConstraint(f"state IN ({values})", name="state")


def _finished(states: frozenset[Any]) -> sa.CheckConstraint:
    values = ", ".join(f"'{state}'" for state in sorted(states))
    return sa.CheckConstraint(f"(finished_at IS NOT NULL) = (state IN ({values}))", name="finished_at")


def _one(name: str, *columns: str, where: str) -> Index:
    """At most one row per ``columns`` among those that satisfy ``where``."""
    return Index(name, *columns, unique=True, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


class Dataset(Base):
    """A named stream of documents that grows by data versions."""

    __tablename__ = "datasets"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("ds"))
    name: Mapped[str] = mapped_column(unique=True)
    description: Mapped[str | None]
    holdout_fraction: Mapped[float]
    created_at: Mapped[datetime]


class DataVersion(Base):
    """One immutable increment of a dataset. ``sha256`` is that of the decoded body. No plan reads an excluded one."""

    __tablename__ = "data_versions"
    __table_args__ = (
        UniqueConstraint("dataset_id", "number"),
        UniqueConstraint("dataset_id", "sha256"),
        sa.CheckConstraint("(excluded_at IS NULL) = (excluded_reason IS NULL)", name="excluded"),
        # Every registration counts the excluded versions, of which there are few.
        Index(
            "ix_data_versions_excluded",
            "dataset_id",
            sqlite_where=sa.text("excluded_at IS NOT NULL"),
            postgresql_where=sa.text("excluded_at IS NOT NULL"),
        ),
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
    """A given evaluation set. The holdouts of data versions are slices too, and need no row of their own."""

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
    """A line of model versions. ``spec`` is a ModelSpec; ``line`` the LineSpec it was resolved to at its first update."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("mdl"))
    name: Mapped[str] = mapped_column(unique=True)
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"), index=True)
    spec: Mapped[dict[str, Any]]
    line: Mapped[dict[str, Any] | None]
    base_key: Mapped[str | None]  # artifact of the base checkpoint, copied when the model was created
    tokenizer_source_key: Mapped[str | None]  # artifact that holds a given tokenizer.json
    created_at: Mapped[datetime]


class Update(Base):
    """The plan that turns one data version into one model version. ``planned``: part two of the plan is written.

    A ``one_off`` update is no part of the line: no other goes on from what it trains. ``branch_from`` is the checkpoint
    that a one-off branch leaves.
    """

    __tablename__ = "updates"
    __table_args__ = (
        _state(UpdateState),
        _finished(FINISHED_UPDATES),
        _one("uq_updates_running", "model_id", where="state = 'running'"),
        Index("ix_updates_state", "state"),
        Index("ix_updates_model_id_id", "model_id", "id"),  # a page of a model's updates, in order
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("upd"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    data_version_id: Mapped[str] = mapped_column(ForeignKey("data_versions.id"), index=True)
    paradigm: Mapped[dict[str, Any]]
    one_off: Mapped[bool] = mapped_column(default=False, server_default=sa.false())
    branch_from: Mapped[str | None] = mapped_column(ForeignKey("checkpoints.id"))
    state: Mapped[str] = mapped_column(default=UpdateState.PENDING)
    planned: Mapped[bool] = mapped_column(default=False)
    branch_point: Mapped[int | None]
    final_step: Mapped[int | None]
    notes: Mapped[dict[str, Any]] = mapped_column(default=dict)
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Stage(Base):
    """One node of an update and its present attempt.

    ``attempt`` counts tries, ``epoch`` counts claims: every write of an orchestrator is guarded by the epoch it claimed
    under, and an expired lease is taken over under a new epoch without a new attempt. ``run_id`` is set as long as
    something may be running under that name.
    """

    __tablename__ = "stages"
    __table_args__ = (
        _state(StageState),
        _finished(FINISHED_STAGES),
        sa.CheckConstraint("(lease_until IS NOT NULL) = (state = 'running')", name="lease"),
        _one("uq_stages_running_key", "key", where="state = 'running' AND key IS NOT NULL"),
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
    state: Mapped[str] = mapped_column(default=StageState.PENDING)
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
    """One optimizer step of a training stage; ``step`` is the line's global step."""

    __tablename__ = "metric_points"

    stage_id: Mapped[str] = mapped_column(ForeignKey("stages.id"), primary_key=True)
    step: Mapped[int] = mapped_column(sa.BigInteger, primary_key=True, autoincrement=False)
    loss: Mapped[float]
    learning_rate: Mapped[float]
    grad_norm: Mapped[float]
    tokens_per_second: Mapped[float]


class Checkpoint(Base):
    """A trunk checkpoint that an update ended its trunk segment with."""

    __tablename__ = "checkpoints"
    __table_args__ = (_state(CheckpointState), UniqueConstraint("model_id", "artifact_key"))

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("ckp"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    state: Mapped[str] = mapped_column(default=CheckpointState.LIVE)
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
        _state(ModelVersionState),
        UniqueConstraint("model_id", "number"),
        _one("uq_model_versions_released", "model_id", where="state = 'released'"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("mv"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    number: Mapped[int]
    data_version: Mapped[int]
    update_id: Mapped[str] = mapped_column(ForeignKey("updates.id"), unique=True)
    state: Mapped[str] = mapped_column(default=ModelVersionState.CANDIDATE)
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
    """One line of the history of what was served, or is asked to be.

    ``rollout`` is the RolloutSpec it was asked for with; None takes over as soon as it is loaded. On the way to being live
    it is begun (replicas load it), tried (all have it), promoted (all are to answer with it). ``trial`` is what was counted.
    """

    __tablename__ = "releases"
    __table_args__ = (
        _state(ReleaseState),
        _one("uq_releases_pending", "model_id", where="state = 'pending'"),
        _one("uq_releases_live", "model_id", where="state = 'live'"),
    )

    id: Mapped[str] = mapped_column(primary_key=True, default=lambda: new_id("rel"))
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    model_version_id: Mapped[str] = mapped_column(ForeignKey("model_versions.id"))
    state: Mapped[str] = mapped_column(default=ReleaseState.PENDING)
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
    """What the replicas of a model said last of what they answer with; ``replicas`` are SeenReplicas."""

    __tablename__ = "observations"

    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)
    replicas: Mapped[list[dict[str, Any]]]
    observed_at: Mapped[datetime]


class Event(Base):
    """What happened, written in the transaction that made it happen."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(
        sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True
    )
    type: Mapped[str]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class IdempotentRequest(Base):
    """A request under a key of its caller's, and its answer once there is one. ``target``: method, path and query."""

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
