"""Metric points of a stage, thinned by the database, and the numbers that monitoring asks for."""

from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.executor import METRIC_COLUMNS, StepMetrics
from service.core.states import ReleaseState, StageState
from service.store.tables import MetricPoint, Model, ModelVersion, Release, Stage, Update

_POINT = tuple(getattr(MetricPoint, name) for name in METRIC_COLUMNS)


def thinned_points(session: Session, stage: Stage, at_most: int) -> list[StepMetrics]:
    """Points of a stage in order of step: all, or ``at_most`` of them, evenly from the first to the last.

    A reused stage has those of the stage that published its artifact, as far as they are of its own steps. Of n
    points, numbered from 0, those are kept at which ⌊number·(at_most-1)/(n-1)⌋ goes up; where there are gaps, but not
    at the steps that are evenly apart, those steps.
    """
    own = sa.and_(
        MetricPoint.stage_id == _trained_by(session, stage), MetricPoint.step > stage.spec.get("from_step", 0)
    )
    in_order = sa.select(*_POINT).where(own).order_by(MetricPoint.step)
    # Two looks at the ends of an index. Counting a million rows takes longer than all else here.
    first = session.scalar(sa.select(sa.func.min(MetricPoint.step)).where(own))
    last = session.scalar(sa.select(sa.func.max(MetricPoint.step)).where(own))
    if first is None or last is None or last - first < at_most:
        return _points(session, in_order)
    points = _points(session, _evenly(own, first, last, at_most))
    if len(points) == at_most:
        return points
    count = session.scalar(sa.select(sa.func.count()).select_from(MetricPoint).where(own)) or 0
    if count <= at_most:
        return _points(session, in_order)
    number = sa.func.row_number().over(order_by=MetricPoint.step) - 1
    numbered = sa.select(*_POINT, number.label("number")).where(own).subquery()
    mark = (at_most - 1) * numbered.c.number // (count - 1)
    mark_before = (at_most - 1) * (numbered.c.number - 1) // (count - 1)
    kept = sa.select(*(numbered.c[column.key] for column in _POINT)).where(
        sa.or_(numbered.c.number == 0, mark > mark_before)
    )
    return _points(session, kept.order_by(numbered.c.step))


def _evenly(own: sa.ColumnElement[bool], first: int, last: int, count: int) -> sa.Select[*tuple[Any, ...]]:
    """The points at ``count`` steps from the first to the last: where there is a point a step, those with those numbers.

    Each is looked up by the primary key. Of a list of steps PostgreSQL may think that to read the whole curve is as fast,
    which of a million points it is not: 180 ms instead of 11. Of a join SQLite may think that it is best begun with the
    curve, and look through all steps for each of its points: minutes.
    """
    marks = sa.select(sa.cast(0, sa.BigInteger).label("mark")).cte("marks", recursive=True)
    marks = marks.union_all(sa.select(marks.c.mark + 1).where(marks.c.mark < count - 1))
    steps = sa.select(first + ((last - first) * marks.c.mark + count - 2) // (count - 1))
    return sa.select(*_POINT).where(own, MetricPoint.step.in_(steps)).order_by(MetricPoint.step)


def _points(session: Session, query: sa.Select[*tuple[Any, ...]]) -> list[StepMetrics]:
    return [StepMetrics(*row) for row in session.execute(query)]


def _trained_by(session: Session, stage: Stage) -> str:
    """Id of the stage whose attempt published what this one has."""
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
    """A model's release and when it last went a step."""

    model: str
    version: int
    state: str
    at: datetime


def release_marks(session: Session) -> list[ReleaseMark]:
    """Of every model what is live, and what was asked for last."""
    last = sa.select(sa.func.max(Release.id)).group_by(Release.model_id)
    at = sa.func.coalesce(
        Release.released_at, Release.promoted_at, Release.tried_at, Release.begun_at, Release.requested_at
    )
    query = (
        sa.select(Model.name, ModelVersion.number, Release.state, at)
        .join(Model, Model.id == Release.model_id)
        .join(ModelVersion, ModelVersion.id == Release.model_version_id)
        .where(sa.or_(Release.state == ReleaseState.LIVE, Release.id.in_(last)))
    )
    return [ReleaseMark(*row) for row in session.execute(query)]


def stages_by_kind_and_state(session: Session) -> dict[tuple[str, str], int]:
    query = sa.select(Stage.kind, Stage.state, sa.func.count()).group_by(Stage.kind, Stage.state)
    return {(kind, state): count for kind, state, count in session.execute(query)}


def seconds_by_kind(session: Session) -> dict[str, tuple[int, float]]:
    """Stage kind -> how many stages of it ran to their end, and the wall-clock seconds of all of them."""
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
