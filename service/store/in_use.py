"""Which artifacts the rows still need: all others are garbage, once they are old enough to belong to nothing under way."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.plan import checkpoint_prefix
from service.core.stage_specs import TRAINING_KINDS, StageKind, TrainStage, artifact_keys
from service.core.states import CheckpointState, StageState, UpdateState
from service.store import lines
from service.store.database import locked
from service.store.tables import (
    Checkpoint,
    DataVersion,
    Model,
    ModelVersion,
    Release,
    Slice,
    Stage,
    Update,
)

# Any fixed number but those of migrations and of events: a registration takes this lock shared and then that of events, and
# two of them would deadlock on one number. Whoever refers to an artifact that it has found shares it, whoever removes has it alone.
_ADVISORY_LOCK = 7_204_103

_DONE = (UpdateState.SUCCEEDED, UpdateState.REJECTED, UpdateState.CANCELLED)
# What a finished update leaves to others. Trunk checkpoints have rows of their own; what a decision made is a row.
_LEFT_BEHIND = (StageKind.TOKENIZER, StageKind.PACK, StageKind.EXPORT, StageKind.EVALUATE)
_ENDS = (StageKind.TRAIN_BRANCH, StageKind.TRAIN, StageKind.MERGE)


@dataclass(frozen=True)
class InUse:
    """Keys of artifacts, and prefixes below which an unfinished training run may look for a checkpoint to go on from."""

    keys: frozenset[str]
    checkpoint_prefixes: frozenset[str]

    def __contains__(self, key: str) -> bool:
        return key in self.keys or key.rpartition("/")[0] in self.checkpoint_prefixes


def share_artifacts(session: Session) -> datetime:
    """Until the end of the transaction, no artifact is removed that is there now. The database's time."""
    return locked(session, _ADVISORY_LOCK, shared=True)


def stop_sharing_artifacts(session: Session) -> None:
    """Wait until nobody is about to refer to an artifact, and have others wait until the end of the transaction."""
    locked(session, _ADVISORY_LOCK)


def artifacts_in_use(session: Session, keep_versions: int | None = None) -> InUse:
    """What must stay.

    Always: data and slices, what models are made from, the trunk's live checkpoints, all that was ever released with the
    checkpoint it left the trunk at, what a line's next update goes on from, and everything that an update which is
    waiting, running or failed (it may be retried) has made or reads. With ``keep_versions``, exports that were never
    released and the checkpoints that versions were exported from stay only for so many of the newest of each model.
    """
    keys: set[str] = set()
    for column in (DataVersion.artifact_key, Slice.artifact_key, Model.base_key, Model.tokenizer_source_key):
        keys.update(session.scalars(sa.select(column).where(column.is_not(None))))
    for line in session.scalars(sa.select(Model.line).where(Model.line.is_not(None))):
        keys.update(artifact_keys(line))
    keys.update(_checkpoints(session))
    keys.update(_left_by_finished(session, keep_versions))
    prefixes: set[str] = set()
    unfinished = sa.select(Stage).join(Update).where(Update.state.not_in(_DONE))
    for stage in session.scalars(unfinished).yield_per(500):
        keys.update(artifact_keys(stage.spec))
        keys.update([stage.key] if stage.key else [])
        if stage.kind in TRAINING_KINDS and stage.state != StageState.SUCCEEDED:
            spec = TrainStage.model_validate(stage.spec)
            prefixes.add(checkpoint_prefix(spec))
    return InUse(frozenset(keys), frozenset(prefixes))


def _checkpoints(session: Session) -> Sequence[str]:
    left_by_released = sa.select(ModelVersion.checkpoint_id).where(
        ModelVersion.id.in_(sa.select(Release.model_version_id)), ModelVersion.checkpoint_id.is_not(None)
    )
    return session.scalars(
        sa.select(Checkpoint.artifact_key).where(
            (Checkpoint.state == CheckpointState.LIVE) | Checkpoint.id.in_(left_by_released)
        )
    ).all()


def _left_by_finished(session: Session, keep_versions: int | None) -> Iterator[str]:
    old = set() if keep_versions is None else _old_versions(session, keep_versions)
    released = set(session.scalars(sa.select(Release.model_version_id)))
    rows = session.execute(
        sa.select(Stage.key, Stage.kind, ModelVersion.id)
        .join(Update, Update.id == Stage.update_id)
        .outerjoin(ModelVersion, ModelVersion.update_id == Update.id)
        .where(
            Stage.kind.in_((*_LEFT_BEHIND, *_ENDS)),
            Update.state.in_((UpdateState.SUCCEEDED, UpdateState.REJECTED)),
        )
    )
    for key, kind, version in rows:
        gone = version in old and (kind in _ENDS or (kind == StageKind.EXPORT and version not in released))
        if key is not None and not gone:
            yield key


def _old_versions(session: Session, keep: int) -> set[str]:
    """Ids of the model versions that are not among the ``keep`` newest of their model, nor what it goes on from."""
    place = sa.func.row_number().over(partition_by=ModelVersion.model_id, order_by=ModelVersion.number.desc())
    numbered = sa.select(ModelVersion.id, place.label("place")).subquery()
    old = set(session.scalars(sa.select(numbered.c.id).where(numbered.c.place > keep)))
    for model in session.scalars(sa.select(Model)):
        newest = lines.newest_version(session, model)
        if newest is not None:
            old.discard(newest.id)
    return old
