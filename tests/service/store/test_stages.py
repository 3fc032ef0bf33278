"""Claims and fences on both databases: a stage has one holder, and writes under an old epoch fail."""

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from service.core.states import StageState
from service.store import datasets, metrics, stages
from service.store.database import Database, now
from service.store.tables import MetricPoint, Stage
from tests.support.rows import add_dataset, add_model, add_ready_stages, add_running_update, ready_stage


def claim(
    database: Database, *ids: str, owner: str = "a", lease: float = 30.0, run_id: str = "run-1"
) -> list[Stage] | None:
    with database.transaction() as session:
        return stages.claim(session, ids, owner=owner, lease_seconds=lease, run_id=run_id)


def reread(database: Database, stage_id: str) -> Stage:
    with database.reading() as session:
        return stages.get(session, stage_id)


def test_a_claim_raises_attempt_and_epoch_and_takes_the_lease_from_the_databases_clock(
    database: Database,
) -> None:
    stage = ready_stage(database)
    claimed_stages = claim(database, stage.id)
    assert claimed_stages is not None
    (claimed,) = claimed_stages
    assert (claimed.attempt, claimed.epoch, claimed.owner, claimed.state) == (1, 1, "a", StageState.RUNNING)
    with database.reading() as session:
        lease_until = stages.get(session, stage.id).lease_until
        assert lease_until is not None
        remaining = (lease_until - now(session)).total_seconds()
    assert 28 < remaining <= 30


def test_a_claimed_stage_cannot_be_claimed_again(database: Database) -> None:
    stage = ready_stage(database)
    assert claim(database, stage.id)
    assert claim(database, stage.id, owner="b") is None


def test_one_of_many_concurrent_claims_succeeds(database: Database) -> None:
    stage = ready_stage(database)
    winners: list[str] = []
    start = threading.Barrier(8)

    def contend(owner: str) -> None:
        own = Database(database.url)
        start.wait()
        if claim(own, stage.id, owner=owner):
            winners.append(owner)
        own.close()

    threads = [threading.Thread(target=contend, args=(f"o{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert reread(database, stage.id).owner == winners[0]
    assert reread(database, stage.id).epoch == 1


def test_a_chain_is_claimed_whole_or_not_at_all(database: Database) -> None:
    with database.transaction() as session:
        dataset = add_dataset(session)
        update = add_running_update(
            session, add_model(session, dataset), datasets.version(session, dataset.id, 1)
        )
        first, second = add_ready_stages(session, update, ["a/1", "a/2"])
    assert claim(database, second.id)
    assert claim(database, first.id, second.id, owner="b") is None
    assert reread(database, first.id).state == StageState.READY


def two_models_with_one_key(database: Database) -> list[str]:
    """Add two models whose pack stages have the same key. Returns the ids of the stages."""
    with database.transaction() as session:
        dataset = add_dataset(session)
        version = datasets.version(session, dataset.id, 1)
        return [
            add_ready_stages(
                session,
                add_running_update(session, add_model(session, dataset, name), version),
                ["pack/same"],
            )[0].id
            for name in ("m", "n")
        ]


def test_stages_with_equal_keys_run_one_at_a_time(database: Database) -> None:
    first, second = two_models_with_one_key(database)
    assert claim(database, first)
    with database.reading() as session:
        assert stages.ready(session) == []
    assert claim(database, second, owner="b") is None
    assert reread(database, second).state == StageState.READY


def test_a_takeover_raises_the_epoch_and_keeps_the_attempt_and_the_run(database: Database) -> None:
    stage = ready_stage(database)
    claim(database, stage.id, lease=0.01)
    time.sleep(0.05)
    with database.transaction() as session:
        (taken,) = stages.take_over_expired(session, owner="b", lease_seconds=30)
    assert (taken.attempt, taken.epoch, taken.owner, taken.run_id) == (1, 2, "b", "run-1")
    with database.transaction() as session:
        assert stages.take_over_expired(session, owner="c", lease_seconds=30) == []


def test_a_write_under_an_old_epoch_is_fenced(database: Database) -> None:
    stage = ready_stage(database)
    claim(database, stage.id, lease=0.01)
    time.sleep(0.05)
    with database.transaction() as session:
        stages.take_over_expired(session, owner="b", lease_seconds=30)
    with pytest.raises(stages.Fenced), database.transaction() as session:
        stages.guarded_update(session, stage.id, 1, result={"from": "a zombie"})
    assert reread(database, stage.id).result is None


def test_renew_returns_the_stages_that_are_no_longer_held(database: Database) -> None:
    stage = ready_stage(database)
    claim(database, stage.id)
    with database.transaction() as session:
        assert stages.renew(session, {stage.id: 1}, 30) == []
        assert stages.renew(session, {stage.id: 7}, 30) == [stage.id]


def test_a_stage_that_waits_for_its_next_attempt_is_not_ready(database: Database) -> None:
    stage = ready_stage(database)
    with database.transaction() as session:
        session.execute(sa.update(Stage).values(ready_at=now(session) + timedelta(minutes=1)))
    with database.reading() as session:
        assert stages.ready(session) == []
    assert reread(database, stage.id).state == StageState.READY


@pytest.mark.parametrize(
    "values",
    [
        {"state": "succeeded"},  # without finished_at
        {"state": "running"},  # without a lease
        {"state": "dancing"},
        {"finished_at": sa.func.now()},
    ],
)
def test_the_database_rejects_inconsistent_stages(database: Database, values: dict[str, Any]) -> None:
    stage = ready_stage(database)
    with pytest.raises(IntegrityError), database.transaction() as session:
        session.execute(sa.update(Stage).where(Stage.id == stage.id).values(**values))


def test_points_measured_again_are_overwritten(database: Database) -> None:
    stage = ready_stage(database)

    def point(step: int, loss: float) -> dict[str, Any]:
        return {"step": step, "loss": loss, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 9.0}

    with database.transaction() as session:
        metrics.record_points(session, stage.id, [point(step, 5.0) for step in range(1, 2501)])
    with database.transaction() as session:
        metrics.record_points(session, stage.id, [point(3, 4.0), point(3, 3.0)])
        assert session.scalar(sa.select(sa.func.count()).select_from(MetricPoint)) == 2500
        assert [row.loss for row in metrics.points(session, stage.id)[:3]] == [5.0, 5.0, 3.0]


def test_a_reading_session_does_not_commit(database: Database) -> None:
    stage = ready_stage(database)
    if database.engine.dialect.name == "sqlite":
        with database.reading() as session:
            session.execute(sa.update(Stage).values(owner="nobody"))
        assert reread(database, stage.id).owner is None
