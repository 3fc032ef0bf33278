"""Metric points of training stages, thinned by the database, and the counts behind ``/metrics``."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from service.core.executor import METRIC_COLUMNS
from service.core.states import ReleaseState, StageState
from service.store.tables import MetricPoint, Model, ModelVersion, Release, Stage, Update

_POINT = tuple(getattr(MetricPoint, name) for name in METRIC_COLUMNS)


def record_points(session: Session, stage_id: str, points: Sequence[Mapping[str, Any]]) -> None:
    """Write points of a training stage. A step that a later attempt measures again overwrites the earlier point."""
    by_step = {
        point["step"]: {"stage_id": stage_id} | {name: point[name] for name in METRIC_COLUMNS}
        for point in points
    }
    rows = list(by_step.values())
    insert_into = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    # A statement carries at most 32,766 (SQLite) or 65,535 (PostgreSQL) parameters.
    for start in range(0, len(rows), 1000):
        insert = insert_into(MetricPoint).values(rows[start : start + 1000])
        measured = {name: insert.excluded[name] for name in METRIC_COLUMNS if name != "step"}
        session.execute(insert.on_conflict_do_update(index_elements=["stage_id", "step"], set_=measured))


def points(session: Session, stage_id: str) -> Sequence[MetricPoint]:
    """Return every point of a stage, in order of step."""
    return session.scalars(
        sa.select(MetricPoint).where(MetricPoint.stage_id == stage_id).order_by(MetricPoint.step)
    ).all()


def thinned_points(session: Session, stage: Stage, max_points: int) -> Sequence[sa.Row[Any]]:
    """Return rows of METRIC_COLUMNS in order of step: all, or ``max_points`` spread evenly from first to last.

    A reused stage has the points of the stage that published its artifact, from its own first step on. If every
    evenly spaced step has a point, returns those points. Otherwise numbers the n points from 0 and returns the ones
    at which ⌊number·(max_points-1)/(n-1)⌋ rises.
    """
    own = sa.and_(
        MetricPoint.stage_id == _trained_by(session, stage), MetricPoint.step > stage.spec.get("from_step", 0)
    )
    in_order = sa.select(*_POINT).where(own).order_by(MetricPoint.step)
    # Reading both ends of the index is cheap; counting a million rows would take longer than everything else here.
    first = session.scalar(sa.select(sa.func.min(MetricPoint.step)).where(own))
    last = session.scalar(sa.select(sa.func.max(MetricPoint.step)).where(own))
    if first is None or last is None or last - first < max_points:
        return session.execute(in_order).all()
    even = session.execute(_evenly(own, first, last, max_points)).all()
    if len(even) == max_points:
        return even
    count = session.scalar(sa.select(sa.func.count()).select_from(MetricPoint).where(own)) or 0
    if count <= max_points:
        return session.execute(in_order).all()
    number = sa.func.row_number().over(order_by=MetricPoint.step) - 1
    numbered = sa.select(*_POINT, number.label("number")).where(own).subquery()
    mark = (max_points - 1) * numbered.c.number // (count - 1)
    mark_before = (max_points - 1) * (numbered.c.number - 1) // (count - 1)
    kept = sa.select(*(numbered.c[column.key] for column in _POINT)).where(
        sa.or_(numbered.c.number == 0, mark > mark_before)
    )
    return session.execute(kept.order_by(numbered.c.step)).all()


def _evenly(own: sa.ColumnElement[bool], first: int, last: int, count: int) -> sa.Select[*tuple[Any, ...]]:
    """Select the points at ``count`` evenly spaced steps, each by its primary key.

    A recursive CTE produces the steps. With a literal list, PostgreSQL's planner would scan the whole
    curve (180 ms instead of 11 ms for a million points); with a join, SQLite's planner would take minutes.
    """
    marks = sa.select(sa.cast(0, sa.BigInteger).label("mark")).cte("marks", recursive=True)
    marks = marks.union_all(sa.select(marks.c.mark + 1).where(marks.c.mark < count - 1))
    steps = sa.select(first + ((last - first) * marks.c.mark + count - 2) // (count - 1))
    return sa.select(*_POINT).where(own, MetricPoint.step.in_(steps)).order_by(MetricPoint.step)


def _trained_by(session: Session, stage: Stage) -> str:
    """Return the id of the stage whose attempt published the artifact of this one."""
    if not stage.reused:
        return stage.id
    trained = session.scalar(
        sa.select(Stage.id)
        .where(Stage.key == stage.key, Stage.state == StageState.SUCCEEDED, ~Stage.reused)
        .order_by(Stage.id)
        .limit(1)
    )
    return trained or stage.id


def updates_by_state(session: Session) -> dict[str, int]:
    query = sa.select(Update.state, sa.func.count()).group_by(Update.state)
    return {row[0]: row[1] for row in session.execute(query)}


def releases_by_state(session: Session) -> dict[str, int]:
    query = sa.select(Release.state, sa.func.count()).group_by(Release.state)
    return {row[0]: row[1] for row in session.execute(query)}


class ReleaseMark(NamedTuple):
    """A release of a model, and when it last changed."""

    model: str
    version: int
    state: str
    at: datetime


def release_marks(session: Session) -> list[ReleaseMark]:
    """Return the live and the most recently requested release of every model."""
    newest = sa.select(sa.func.max(Release.id)).group_by(Release.model_id)
    changed_at = sa.func.coalesce(
        Release.released_at, Release.promoted_at, Release.tried_at, Release.begun_at, Release.requested_at
    )
    query = (
        sa.select(Model.name, ModelVersion.number, Release.state, changed_at)
        .join(Model, Model.id == Release.model_id)
        .join(ModelVersion, ModelVersion.id == Release.model_version_id)
        .where(sa.or_(Release.state == ReleaseState.LIVE, Release.id.in_(newest)))
    )
    return [ReleaseMark(*row) for row in session.execute(query)]


def stages_by_kind_and_state(session: Session) -> dict[tuple[str, str], int]:
    query = sa.select(Stage.kind, Stage.state, sa.func.count()).group_by(Stage.kind, Stage.state)
    return {(kind, state): count for kind, state, count in session.execute(query)}


def seconds_by_kind(session: Session) -> dict[str, tuple[int, float]]:
    """Map each stage kind to the number of finished stages and the sum of their wall-clock seconds."""
    if session.get_bind().dialect.name == "postgresql":
        seconds: sa.ColumnElement[Any] = sa.extract("epoch", Stage.finished_at - Stage.started_at)
    else:
        seconds = (sa.func.julianday(Stage.finished_at) - sa.func.julianday(Stage.started_at)) * 86400
    query = (
        sa.select(Stage.kind, sa.func.count(), sa.func.sum(seconds))
        .where(Stage.finished_at.is_not(None), Stage.started_at.is_not(None))
        .group_by(Stage.kind)
    )
    return {kind: (count, float(total)) for kind, count, total in session.execute(query)}
