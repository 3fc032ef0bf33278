"""Stages as a durable queue: claim under a lease and an epoch, write only while both hold.

Every write of an orchestrator names the epoch it claimed under. Whoever was presumed dead and claims to have a result
afterwards finds that no row matches, and is told so by ``Fenced``.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.core import retry
from service.core.executor import METRIC_COLUMNS, RunError
from service.core.ledger import LedgerEntry
from service.core.plan import pack_name
from service.core.retry import MAX_ATTEMPTS
from service.core.stage_specs import TRAINING_KINDS, StageKind, TrainStage
from service.core.states import StageState
from service.store.database import now
from service.store.tables import MetricPoint, Stage, Update

# Of a stage that nobody holds any more, and under whose name nothing runs.
LET_GO = {"owner": None, "lease_until": None, "run_id": None}


# A lease or a wait that ends later than any could was written before the clock was set back: it would hold for as long
# as the clock was moved. Taking over too early does no harm, so leases need not be equally long everywhere.
_LEASES_AHEAD = 10


class Fenced(Exception):
    """The stage is not held under that epoch any more: cancelled, or taken over by another orchestrator."""


def get(session: Session, stage_id: str) -> Stage:
    row = session.get(Stage, stage_id)
    assert row is not None
    return row


def ready(session: Session, limit: int = 100) -> Sequence[Stage]:
    """Stages that may run now, oldest first; not those whose key some other stage is producing already."""
    other = sa.orm.aliased(Stage)
    being_made = sa.exists().where(other.key == Stage.key, other.state == StageState.RUNNING)
    at = now(session)
    due = (Stage.ready_at <= at) | (Stage.ready_at > at + timedelta(seconds=retry.LONGEST_WAIT_SECONDS))
    return session.scalars(
        sa.select(Stage)
        .where(Stage.state == StageState.READY, due, ~being_made)
        .order_by(Stage.ready_at, Stage.id)
        .limit(limit)
    ).all()


def claim(
    session: Session,
    stage_ids: Sequence[str],
    *,
    owner: str,
    lease_seconds: float,
    run_id: str | None,
    from_states: Sequence[StageState] = (StageState.READY,),
) -> list[Stage] | None:
    """Claim all of ``stage_ids`` for a new attempt under one run, or none of them (None: someone else was faster)."""
    at = now(session)
    query = sa.select(Stage).where(Stage.id.in_(stage_ids), Stage.state.in_(from_states))
    rows = session.scalars(query.order_by(Stage.position).with_for_update(skip_locked=True)).all()
    if len(rows) != len(stage_ids):
        return None
    try:
        with session.begin_nested():
            for row in rows:
                row.state = StageState.RUNNING
                row.attempt += 1
                row.epoch += 1
                row.owner = owner
                row.lease_until = at + timedelta(seconds=lease_seconds)
                row.run_id = run_id
                row.ready_at = None
                row.progress = None
                row.error = None
                row.started_at = at
            session.flush()
    except IntegrityError:  # another stage with the same key began to run since we looked
        return None
    return list(rows)


def next_begins(session: Session, run_id: str) -> None:
    """A stage of the run has ended: the next of its chain, claimed with it, has begun only now."""
    held = sa.select(Stage.id).where(Stage.run_id == run_id, Stage.state == StageState.RUNNING)
    following = session.scalar(held.order_by(Stage.position).limit(1))
    session.execute(
        sa.update(Stage)
        .where(Stage.id == following, Stage.run_id == run_id, Stage.state == StageState.RUNNING)
        .values(started_at=now(session))
        .execution_options(synchronize_session=False)
    )


def any_held(session: Session, run_id: str) -> bool:
    """Whether some stage is held that waits for this run."""
    held = sa.exists().where(Stage.run_id == run_id, Stage.state == StageState.RUNNING)
    return bool(session.scalar(sa.select(held)))


def take_over_expired(session: Session, *, owner: str, lease_seconds: float) -> list[Stage]:
    """Take over running stages whose lease has run out: a new epoch, the same attempt, the same run."""
    at = now(session)
    rows = session.scalars(
        sa.select(Stage)
        .where(Stage.state == StageState.RUNNING, _has_run_out(at, lease_seconds))
        .with_for_update(skip_locked=True)
    ).all()
    for row in rows:
        row.epoch += 1
        row.owner = owner
        row.lease_until = at + timedelta(seconds=lease_seconds)
    session.flush()
    return list(rows)


def ids_running_of(session: Session, owner: str) -> Sequence[str]:
    """Stages that are running under that name."""
    return session.scalars(
        sa.select(Stage.id).where(Stage.state == StageState.RUNNING, Stage.owner == owner)
    ).all()


def reclaim(session: Session, stage_ids: Sequence[str], *, owner: str, lease_seconds: float) -> list[Stage]:
    """Renew the leases of those of ``stage_ids`` that ``owner`` still holds, and return their rows."""
    until = now(session) + timedelta(seconds=lease_seconds)
    query = sa.select(Stage).where(
        Stage.id.in_(stage_ids), Stage.state == StageState.RUNNING, Stage.owner == owner
    )
    rows = session.scalars(query.order_by(Stage.position).with_for_update()).all()
    for row in rows:
        row.lease_until = until
    session.flush()
    return list(rows)


def guarded_update(session: Session, stage_id: str, epoch: int, **values: Any) -> None:
    """Write to a stage that is held under ``epoch``. Raises Fenced where it is not."""
    result = session.execute(
        sa.update(Stage)
        .where(Stage.id == stage_id, Stage.epoch == epoch, Stage.state == StageState.RUNNING)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    if not result.rowcount:  # type: ignore[attr-defined]
        raise Fenced(stage_id)


def lost_attempt(stage: Stage, error: RunError, at: datetime) -> tuple[dict[str, Any], float]:
    """What to write down of the stage's present attempt, which ends ``at`` with the error, and the seconds wasted by then."""
    # The clock may have been set back since it began.
    took = max(0.0, (at - stage.started_at).total_seconds()) if stage.started_at else 0.0
    written = {"code": error.code, "detail": error.detail, "attempt": stage.attempt}
    return written, stage.wasted_seconds + took


def reopen_succeeded(session: Session, stage_id: str) -> None:
    """What the stage had published is damaged: it runs again, with a fresh number of attempts. Not where it does already."""
    session.execute(
        sa.update(Stage)
        .where(Stage.id == stage_id, Stage.state == StageState.SUCCEEDED)
        .values(
            state=StageState.READY,
            max_attempts=Stage.attempt + MAX_ATTEMPTS,
            ready_at=now(session),
            finished_at=None,
            reused=False,
            result=None,
        )
        .execution_options(synchronize_session=False)
    )


def renew(session: Session, held: Mapping[str, int], lease_seconds: float) -> list[str]:
    """Extend the leases of ``held`` (stage id -> epoch). Returns the ids that are not ours any more."""
    until = now(session) + timedelta(seconds=lease_seconds)
    lost = []
    for stage_id, epoch in held.items():
        try:
            guarded_update(session, stage_id, epoch, lease_until=until)
        except Fenced:
            lost.append(stage_id)
    return lost


def record_points(session: Session, stage_id: str, points: Sequence[Mapping[str, Any]]) -> None:
    """Write points of a training stage; a step measured again (by a later attempt) is overwritten."""
    if not points:
        return
    by_step = {
        point["step"]: {"stage_id": stage_id} | {name: point[name] for name in METRIC_COLUMNS}
        for point in points
    }
    dialect = session.get_bind().dialect.name
    rows = list(by_step.values())
    # A statement may carry at most 32,766 (SQLite) or 65,535 (PostgreSQL) parameters.
    for start in range(0, len(rows), 1000):
        insert = _insert(dialect).values(rows[start : start + 1000])
        session.execute(
            insert.on_conflict_do_update(
                index_elements=["stage_id", "step"],
                set_={name: insert.excluded[name] for name in METRIC_COLUMNS if name != "step"},
            )
        )


def _insert(dialect: str) -> Any:
    if dialect == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as postgresql_insert

        return postgresql_insert(MetricPoint)
    from sqlalchemy.dialects.sqlite import insert as sqlite_insert

    return sqlite_insert(MetricPoint)


def points(session: Session, stage_id: str) -> Sequence[MetricPoint]:
    return session.scalars(
        sa.select(MetricPoint).where(MetricPoint.stage_id == stage_id).order_by(MetricPoint.step)
    ).all()


def needs_succeeded(session: Session, stage: Stage) -> bool:
    """Whether everything that the stage needs has succeeded."""
    open_needs = sa.exists().where(Stage.id.in_(stage.needs), Stage.state != StageState.SUCCEEDED)
    return not session.scalar(sa.select(open_needs))


def any_expired(session: Session, lease_seconds: float) -> bool:
    """Whether some lease has run out."""
    has_run_out = _has_run_out(now(session), lease_seconds)
    return bool(session.scalar(sa.select(sa.exists().where(Stage.state == StageState.RUNNING, has_run_out))))


def _has_run_out(at: datetime, lease_seconds: float) -> sa.ColumnElement[bool]:
    longest = timedelta(seconds=_LEASES_AHEAD * lease_seconds)
    return (Stage.lease_until < at) | (Stage.lease_until > at + longest)


def runs_to_end(session: Session) -> Sequence[str]:
    """Runs of cancelled stages that may still be going on, and that no other stage needs."""
    other = sa.orm.aliased(Stage)
    needed = sa.exists().where(other.run_id == Stage.run_id, other.state == StageState.RUNNING)
    return session.scalars(
        sa.select(Stage.run_id)
        .where(Stage.state == StageState.CANCELLED, Stage.run_id.is_not(None), ~needed)
        .distinct()
    ).all()  # type: ignore[return-value]


def running_of_kind(session: Session, kind: StageKind) -> Sequence[Stage]:
    return session.scalars(
        sa.select(Stage).where(Stage.kind == kind, Stage.state == StageState.RUNNING)
    ).all()


def forget_run(session: Session, run_id: str) -> None:
    """The run is gone: nothing is running under that name for cancelled stages."""
    session.execute(
        sa.update(Stage)
        .where(Stage.run_id == run_id, Stage.state == StageState.CANCELLED)
        .values(run_id=None)
        .execution_options(synchronize_session=False)
    )


def spec_by_key(session: Session, key: str) -> dict[str, Any]:
    """The spec that any stage publishing under ``key`` was written with: equal keys have equal specs."""
    spec: dict[str, Any] | None = session.scalar(sa.select(Stage.spec).where(Stage.key == key).limit(1))
    assert spec is not None
    return spec


def newest_pack_specs(session: Session, model_id: str, up_to: int) -> dict[str, dict[str, Any]]:
    """Stage name -> spec of the packs of data versions up to ``up_to`` in the line's newest planned update."""
    newest = (
        sa.select(Update.id)
        .where(Update.model_id == model_id, Update.planned, ~Update.one_off)
        .order_by(Update.id.desc())
        .limit(1)
        .scalar_subquery()
    )
    rows = session.execute(
        sa.select(Stage.name, Stage.spec).where(Stage.update_id == newest, Stage.kind == StageKind.PACK)
    ).all()
    wanted = {pack_name(number) for number in range(1, up_to + 1)}
    return {name: spec for name, spec in rows if name in wanted}


def known_ledger(session: Session, model_id: str, up_to: int) -> tuple[LedgerEntry, ...] | None:
    """The ledger up to a data version as the line's training stages have it; None where none has read that far."""
    rows = session.scalars(
        sa.select(Stage.spec)
        .join(Update, Update.id == Stage.update_id)
        .where(Update.model_id == model_id, ~Update.one_off, Stage.kind.in_(TRAINING_KINDS))
        .order_by(Stage.id.desc())
    )
    for spec in rows:
        ledger = TrainStage.model_validate(spec).ledger
        if any(entry.number >= up_to for entry in ledger):
            return tuple(entry for entry in ledger if entry.number <= up_to)
    return None
