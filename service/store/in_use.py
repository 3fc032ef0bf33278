"""Which artifacts the rows still need. Garbage collection removes all others once they are old enough."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.plan import checkpoint_prefix
from service.core.stage_specs import LineSpec, StageKind, TrainStage, parse_stage_spec
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

# Must differ from the lock numbers of migrations and of events: a registration takes this lock (shared) and then the
# events lock, and two registrations would deadlock on a single number.
_ADVISORY_LOCK = 7_204_103

_ENDED = (UpdateState.SUCCEEDED, UpdateState.REJECTED, UpdateState.CANCELLED)
# Artifacts of a finished update that later updates use. Trunk checkpoints are not listed: they have rows of their own.
_REUSED_KINDS = (StageKind.TOKENIZER, StageKind.PACK, StageKind.EXPORT, StageKind.EVALUATE)
# Stages whose artifact is the checkpoint that a version was exported from.
_FINAL_CHECKPOINT_KINDS = (StageKind.TRAIN_BRANCH, StageKind.TRAIN, StageKind.MERGE)


@dataclass(frozen=True)
class InUse:
    """Artifact keys in use, and the prefixes under which unfinished training stages look for checkpoints to resume from."""

    keys: frozenset[str]
    checkpoint_prefixes: frozenset[str]

    def __contains__(self, key: str) -> bool:
        return key in self.keys or key.rpartition("/")[0] in self.checkpoint_prefixes


def share_artifacts(session: Session) -> datetime:
    """Keep garbage collection from removing artifacts until the transaction ends. Returns the database's time.

    Take this lock before checking that an artifact exists and storing a reference to it.
    """
    return locked(session, _ADVISORY_LOCK, shared=True)


def lock_artifacts_for_removal(session: Session) -> None:
    """Wait for the transactions that share the artifacts, and block new ones until this transaction ends."""
    locked(session, _ADVISORY_LOCK)


def artifacts_in_use(session: Session, keep_versions: int | None = None) -> InUse:
    """The artifacts that garbage collection must keep.

    Always: data and slices; what models are made from; the trunk's live checkpoints; every released version with the
    trunk checkpoint it branched from; what a line's next update continues from; and all inputs and outputs of updates
    that are waiting, running or failed (a failed one may be retried). ``keep_versions`` limits unreleased exports, and
    the checkpoints that versions were exported from, to the newest ``keep_versions`` versions of each model.
    """
    keys: set[str] = set()
    for column in (DataVersion.artifact_key, Slice.artifact_key, Model.base_key, Model.tokenizer_source_key):
        keys.update(session.scalars(sa.select(column).where(column.is_not(None))))
    for line in session.scalars(sa.select(Model.line).where(Model.line.is_not(None))):
        keys.update(LineSpec.model_validate(line).artifact_keys())
    keys.update(_checkpoints(session))
    keys.update(_outputs_of_finished_updates(session, keep_versions))
    prefixes: set[str] = set()
    unfinished = sa.select(Stage).join(Update).where(Update.state.not_in(_ENDED))
    for stage in session.scalars(unfinished).yield_per(500):
        spec = parse_stage_spec(stage.kind, stage.spec)
        keys.update(spec.artifact_keys())
        if stage.key is not None:
            keys.add(stage.key)
        if isinstance(spec, TrainStage) and stage.state != StageState.SUCCEEDED:
            prefixes.add(checkpoint_prefix(spec))
    return InUse(frozenset(keys), frozenset(prefixes))


def _checkpoints(session: Session) -> Sequence[str]:
    of_released_versions = sa.select(ModelVersion.checkpoint_id).where(
        ModelVersion.id.in_(sa.select(Release.model_version_id)), ModelVersion.checkpoint_id.is_not(None)
    )
    return session.scalars(
        sa.select(Checkpoint.artifact_key).where(
            (Checkpoint.state == CheckpointState.LIVE) | Checkpoint.id.in_(of_released_versions)
        )
    ).all()


def _outputs_of_finished_updates(session: Session, keep_versions: int | None) -> Iterator[str]:
    old = set() if keep_versions is None else _old_versions(session, keep_versions)
    released = set(session.scalars(sa.select(Release.model_version_id)))
    rows = session.execute(
        sa.select(Stage.key, Stage.kind, ModelVersion.id)
        .join(Update, Update.id == Stage.update_id)
        .outerjoin(ModelVersion, ModelVersion.update_id == Update.id)
        .where(
            Stage.kind.in_((*_REUSED_KINDS, *_FINAL_CHECKPOINT_KINDS)),
            Update.state.in_((UpdateState.SUCCEEDED, UpdateState.REJECTED)),
        )
    )
    for key, kind, version in rows:
        is_checkpoint = kind in _FINAL_CHECKPOINT_KINDS
        is_unreleased_export = kind == StageKind.EXPORT and version not in released
        is_expired = version in old and (is_checkpoint or is_unreleased_export)
        if key is not None and not is_expired:
            yield key


def _old_versions(session: Session, keep_versions: int) -> set[str]:
    """Ids of the model versions beyond each model's newest ``keep_versions``, except those that it continues from."""
    age = sa.func.row_number().over(partition_by=ModelVersion.model_id, order_by=ModelVersion.number.desc())
    numbered = sa.select(ModelVersion.id, age.label("age")).subquery()
    old = set(session.scalars(sa.select(numbered.c.id).where(numbered.c.age > keep_versions)))
    for model in session.scalars(sa.select(Model)):
        newest = lines.newest_version(session, model)
        if newest is not None:
            old.discard(newest.id)
    return old
