"""Long lists and curves: an index finds a page, and the database thins a curve without reading all points."""

import time

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from service.core.stage_specs import StageKind
from service.core.states import StageState
from service.store import datasets, updates
from service.store.database import Database, now
from service.store.metrics import thinned_points
from service.store.tables import MetricPoint, Stage
from tests.support.rows import add_dataset, add_model, add_running_update


def _plans(session: Session, statements: list[tuple[str, object]]) -> list[str]:
    return [
        str(row[-1])
        for text, parameters in statements
        for row in session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", parameters)  # type: ignore[arg-type]
    ]


def test_an_index_finds_a_page_without_sorting_the_list(sqlite: Database) -> None:
    statements: list[tuple[str, object]] = []

    def note(_c: object, _u: object, text: str, parameters: object, _x: object, many: bool) -> None:
        if text.startswith("SELECT"):
            statements.append((text, parameters))

    with sqlite.transaction() as session:
        dataset = add_dataset(session, versions=3)
        model = add_model(session, dataset)
        version = datasets.version(session, dataset.id, 1)
        update = add_running_update(session, model, version)
    with sqlite.reading() as session:
        sa.event.listen(sqlite.engine, "before_cursor_execute", note)
        datasets.page_of_versions(session, dataset.id, version.id, 100)
        updates.page_of_updates(session, model.id, update.id, 100)
        updates.ids_by_data_version(session, [version.id])
        updates.stages_of_updates(session, [update.id])
        sa.event.remove(sqlite.engine, "before_cursor_execute", note)
        plans = _plans(session, statements)
    assert len(statements) == 6
    assert all(plan.startswith(("SEARCH", "USE TEMP B-TREE")) for plan in plans), plans
    # SQLite may sort the few updates and stages of a page, but not the whole list.
    pages = [statement for statement in statements if "LIMIT" in statement[0]]
    assert len(pages) == 2
    with sqlite.reading() as session:
        assert not any("TEMP B-TREE" in plan for plan in _plans(session, pages))


def _stage_with_points(database: Database, steps: list[int]) -> Stage:
    with database.transaction() as session:
        dataset = add_dataset(session)
        update = add_running_update(
            session, add_model(session, dataset), datasets.version(session, dataset.id, 1)
        )
        stage = Stage(
            update_id=update.id,
            position=0,
            name="train",
            kind=StageKind.TRAIN_TRUNK,
            spec={},
            needs=[],
            state=StageState.READY,
            created_at=now(session),
        )
        session.add(stage)
        session.flush()
        session.add_all(
            MetricPoint(
                stage_id=stage.id,
                step=step,
                loss=1.0,
                learning_rate=1.0,
                grad_norm=1.0,
                tokens_per_second=1.0,
            )
            for step in steps
        )
    return stage


@pytest.mark.parametrize("count", [11, 12, 25, 100])
def test_points_without_gaps_are_thinned_evenly(database: Database, count: int) -> None:
    stage = _stage_with_points(database, list(range(5, 5 + count)))
    with database.reading() as session:
        steps = [point.step for point in thinned_points(session, stage, 10)]
    kept = [n for n in range(count) if n == 0 or 9 * n // (count - 1) > 9 * (n - 1) // (count - 1)]
    assert steps == [5 + number for number in kept]
    assert len(steps) == 10


def test_points_with_gaps_are_thinned_and_short_curves_are_kept_whole(database: Database) -> None:
    gaps = [*range(1, 30), *range(1001, 1030)]
    stage = _stage_with_points(database, gaps)
    with database.reading() as session:
        steps = [point.step for point in thinned_points(session, stage, 10)]
        assert (len(steps), steps[0], steps[-1]) == (10, 1, 1029)
        assert [point.step for point in thinned_points(session, stage, 58)] == gaps


def test_thinning_does_not_read_a_long_curve(database: Database) -> None:
    count = 100_000
    stage = _stage_with_points(database, [])
    with database.transaction() as session:
        steps = sa.select(sa.literal(1).label("step")).cte("steps", recursive=True)
        steps = steps.union_all(sa.select(steps.c.step + 1).where(steps.c.step < count))
        one = [sa.literal(1.0)] * 4
        columns = ["stage_id", "step", "loss", "learning_rate", "grad_norm", "tokens_per_second"]
        rows = sa.select(sa.literal(stage.id), steps.c.step, *one)
        session.execute(sa.insert(MetricPoint).from_select(columns, rows))
    with database.reading() as session:
        began = time.monotonic()
        points = thinned_points(session, stage, 2000)
        seconds = time.monotonic() - began
    assert (len(points), points[0].step, points[-1].step) == (2000, 1, count)
    # It takes 15 ms. Searching all marks for each point would take ten seconds.
    assert seconds < 2
