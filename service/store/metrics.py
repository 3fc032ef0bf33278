"""Metric points of a stage, thinned by the database, and the numbers that monitoring asks for."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.states import StageState
from service.store.tables import MetricPoint, Stage, Update


def thinned_points(session: Session, stage: Stage, at_most: int) -> Sequence[MetricPoint]:
    """Points of a stage in order of step: all, or ``at_most`` of them, evenly from the first to the last.

    A reused stage has those of the stage that published its artifact, as far as they are of its own steps. Of n
    points, numbered from 0, those are kept at which ⌊number·(at_most-1)/(n-1)⌋ goes up; where there are gaps, but not
    at the steps that are evenly apart, those steps.
    """
    own = sa.and_(
        MetricPoint.stage_id == _trained_by(session, stage), MetricPoint.step > stage.spec.get("from_step", 0)
    )
    # Counting a million rows takes longer than all else here: whether there are more than so many is enough at first.
    few = sa.select(MetricPoint.step).where(own).limit(at_most + 1).subquery()
    if (session.scalar(sa.select(sa.func.count()).select_from(few)) or 0) <= at_most:
        return session.scalars(sa.select(MetricPoint).where(own).order_by(MetricPoint.step)).all()
    first = session.scalar(sa.select(sa.func.min(MetricPoint.step)).where(own))
    last = session.scalar(sa.select(sa.func.max(MetricPoint.step)).where(own))
    assert first is not None
    assert last is not None
    # A point a step, as runs leave them, has its number by its step, and is looked up by the primary key.
    steps = [first - (first - last) * mark // (at_most - 1) for mark in range(at_most)]
    evenly = sa.select(MetricPoint).where(own, MetricPoint.step.in_(steps)).order_by(MetricPoint.step)
    points = session.scalars(evenly).all()
    if len(points) == at_most:
        return points
    count = session.scalar(sa.select(sa.func.count()).select_from(MetricPoint).where(own)) or 0
    number = sa.func.row_number().over(order_by=MetricPoint.step) - 1
    numbered = sa.select(MetricPoint, number.label("number")).where(own).subquery()
    point = sa.orm.aliased(MetricPoint, numbered)
    mark = (at_most - 1) * numbered.c.number // (count - 1)
    mark_before = (at_most - 1) * (numbered.c.number - 1) // (count - 1)
    kept = sa.select(point).where(sa.or_(numbered.c.number == 0, mark > mark_before))
    return session.scalars(kept.order_by(point.step)).all()


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
