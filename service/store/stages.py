"""Stages as a durable queue: an orchestrator claims a stage under a lease and an epoch, and writes only while both hold.

Every write names the epoch of the claim. If an orchestrator that was presumed dead reports a result later, its write
matches no row and raises ``Fenced``.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.core import retry
from service.core.executor import RunError
from service.core.retry import MAX_ATTEMPTS
from service.core.stage_specs import StageKind
from service.core.states import StageState
from service.store.database import now
from service.store.tables import Stage

# The columns of a claim, cleared: no orchestrator holds the stage, and nothing runs for it.
RELEASED_CLAIM = {"owner": None, "lease_until": None, "run_id": None}

# If a lease ends more than this many lease lengths ahead, the database's clock was set back after it was written, and
# it would last for as long as the clock was moved back. Taking a stage over early is harmless, so orchestrators may use
# different lease lengths.
_LEASES_AHEAD = 10


class Fenced(Exception):
    """The epoch no longer holds the stage: it was cancelled, or another orchestrator took it over."""


def get(session: Session, stage_id: str) -> Stage:
    row = session.get(Stage, stage_id)
    assert row is not None
    return row


def ready(session: Session, limit: int = 100) -> Sequence[Stage]:
    """Return the stages that may run now, oldest first. A stage waits while another one produces the same key."""
    other = sa.orm.aliased(Stage)
    in_production = sa.exists().where(other.key == Stage.key, other.state == StageState.RUNNING)
    at = now(session)
    due = (Stage.ready_at <= at) | (Stage.ready_at > at + timedelta(seconds=retry.LONGEST_WAIT_SECONDS))
    return session.scalars(
        sa.select(Stage)
        .where(Stage.state == StageState.READY, due, ~in_production)
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
    """Claim all of ``stage_ids`` for a new attempt under one run; None, and none claimed, if another claim came first."""
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
    except IntegrityError:  # another stage with the same key started since the query
        return None
    return list(rows)


def start_next_of_run(session: Session, run_id: str) -> None:
    """Set the start time of the next stage of a run, which was claimed with the first but starts when that one ends."""
    running = sa.select(Stage.id).where(Stage.run_id == run_id, Stage.state == StageState.RUNNING)
    following = session.scalar(running.order_by(Stage.position).limit(1))
    session.execute(
        sa.update(Stage)
        .where(Stage.id == following, Stage.run_id == run_id, Stage.state == StageState.RUNNING)
        .values(started_at=now(session))
        .execution_options(synchronize_session=False)
    )


def any_running(session: Session, run_id: str) -> bool:
    """Whether any stage waits for this run."""
    running = sa.exists().where(Stage.run_id == run_id, Stage.state == StageState.RUNNING)
    return bool(session.scalar(sa.select(running)))


def take_over_expired(session: Session, *, owner: str, lease_seconds: float) -> list[Stage]:
    """Take over running stages whose lease has expired: a new epoch, the same attempt and run."""
    at = now(session)
    rows = session.scalars(
        sa.select(Stage)
        .where(Stage.state == StageState.RUNNING, _has_expired(at, lease_seconds))
        .with_for_update(skip_locked=True)
    ).all()
    for row in rows:
        row.epoch += 1
        row.owner = owner
        row.lease_until = at + timedelta(seconds=lease_seconds)
    session.flush()
    return list(rows)


def ids_running_of(session: Session, owner: str) -> Sequence[str]:
    """Return the ids of the stages that ``owner`` runs."""
    return session.scalars(
        sa.select(Stage.id).where(Stage.state == StageState.RUNNING, Stage.owner == owner)
    ).all()


def reclaim(session: Session, stage_ids: Sequence[str], *, owner: str, lease_seconds: float) -> list[Stage]:
    """Renew the leases of those stages that ``owner`` still runs, and return them."""
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
    """Write to a running stage. Raises Fenced unless ``epoch`` holds it."""
    result = session.execute(
        sa.update(Stage)
        .where(Stage.id == stage_id, Stage.epoch == epoch, Stage.state == StageState.RUNNING)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
    if not result.rowcount:  # type: ignore[attr-defined]
        raise Fenced(stage_id)


def lost_attempt(stage: Stage, error: RunError, at: datetime) -> tuple[dict[str, Any], float]:
    """Return the error document of an attempt that fails ``at`` this time, and the stage's total wasted seconds."""
    # The clock may have been set back since the attempt began.
    seconds = max(0.0, (at - stage.started_at).total_seconds()) if stage.started_at else 0.0
    document = {"code": error.code, "detail": error.detail, "attempt": stage.attempt}
    return document, stage.wasted_seconds + seconds


def reopen_succeeded(session: Session, stage_id: str) -> None:
    """Make a stage ready again because its artifact is damaged, with its full number of attempts; no-op if it is running."""
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
    """Extend the leases of ``held`` (stage id -> epoch). Returns the ids of stages that were lost to another claim."""
    until = now(session) + timedelta(seconds=lease_seconds)
    lost = []
    for stage_id, epoch in held.items():
        try:
            guarded_update(session, stage_id, epoch, lease_until=until)
        except Fenced:
            lost.append(stage_id)
    return lost


def needs_succeeded(session: Session, stage: Stage) -> bool:
    """Whether every stage that this one needs has succeeded."""
    open_needs = sa.exists().where(Stage.id.in_(stage.needs), Stage.state != StageState.SUCCEEDED)
    return not session.scalar(sa.select(open_needs))


def any_expired(session: Session, lease_seconds: float) -> bool:
    """Whether any lease has expired."""
    is_expired = _has_expired(now(session), lease_seconds)
    return bool(session.scalar(sa.select(sa.exists().where(Stage.state == StageState.RUNNING, is_expired))))


def _has_expired(at: datetime, lease_seconds: float) -> sa.ColumnElement[bool]:
    longest = timedelta(seconds=_LEASES_AHEAD * lease_seconds)
    return (Stage.lease_until < at) | (Stage.lease_until > at + longest)


def runs_to_end(session: Session) -> Sequence[str]:
    """Return the ids of runs that belong only to cancelled stages and may still be running."""
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
    """Record that a run has ended: its cancelled stages no longer refer to it."""
    session.execute(
        sa.update(Stage)
        .where(Stage.run_id == run_id, Stage.state == StageState.CANCELLED)
        .values(run_id=None)
        .execution_options(synchronize_session=False)
    )
