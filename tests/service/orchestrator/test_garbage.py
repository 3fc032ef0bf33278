"""What no row needs is collected, and nothing else: not what a line goes on from, not what somebody begins to need meanwhile."""

import os
import threading
import time
from collections.abc import Sequence

import sqlalchemy as sa

from service.artifacts import Artifacts
from service.collect_garbage import Garbage, Reason, find_garbage, remove_garbage
from service.core.executor import RunError
from service.core.manifest import MANIFEST
from service.core.plan import own_checkpoint_prefix, trunk_prefix
from service.core.stage_specs import StageKind, TrainStage
from service.core.states import CheckpointState, ModelVersionState, UpdateState
from service.operations.updates import cancel_update
from service.store import datasets
from service.store.in_use import share_artifacts
from service.store.tables import Checkpoint, DataVersion, ModelVersion, Stage
from tests.service.orchestrator.conftest import House
from tests.support.rows import add_data_version

FATAL = RunError("", "diverged", "loss is not finite", retryable=False)


def put(artifacts: Artifacts, key: str) -> None:
    with artifacts.writing(key) as directory:
        (directory / "content").write_text(key)
        artifacts.publish(key, directory, {})


def found(house: House, *, hours: float = 0, keep_versions: int | None = None) -> list[Garbage]:
    return find_garbage(
        house.database, house.artifacts, older_than_seconds=hours * 3600 - 1, keep_versions=keep_versions
    )


def keys(garbage: Sequence[Garbage]) -> set[str]:
    return {item.key for item in garbage}


def collect(house: House, keep_versions: int | None = None) -> set[str]:
    garbage = found(house, keep_versions=keep_versions)
    return keys(remove_garbage(house.database, house.artifacts, garbage, keep_versions=keep_versions))


def line(house: House, versions: int) -> str:
    """A model whose updates to that many data versions have all succeeded."""
    model = house.add_model(versions=versions)
    for number in range(1, versions + 1):
        house.finish(house.orchestrator(), house.add_update(model, number))
    return model


def training(house: House, update: str, name: str) -> TrainStage:
    return TrainStage.model_validate(house.stages(update)[name].spec)


def stage_keys(house: House) -> set[str]:
    with house.database.reading() as session:
        return set(session.scalars(sa.select(Stage.key).where(Stage.key.is_not(None))))


def test_checkpoints_of_ended_runs_and_what_nobody_names_go_and_the_line_goes_on(house: House) -> None:
    model = line(house, 2)
    for number in (1, 2):
        with house.database.reading() as session:
            put(house.artifacts, datasets.version(session, model_dataset(house), number).artifact_key)
    with house.database.reading() as session:
        last = session.scalars(sa.select(Stage).where(Stage.kind == StageKind.TRAIN_BRANCH)).all()[-1]
    branch = TrainStage.model_validate(last.spec)
    periodic = {f"{trunk_prefix(branch.line)}/000000010-x", f"{own_checkpoint_prefix(branch)}/000000200"}
    for key in {*periodic, "pack/of-a-lost-race"}:
        put(house.artifacts, key)
    half = house.artifacts.root / "pack/unfinished/w-0123456789ab/deep/half"
    half.parent.mkdir(parents=True)
    half.write_text("half")

    garbage = found(house)
    assert keys(garbage) == {*periodic, "pack/of-a-lost-race", "pack/unfinished"}
    reasons = {item.key: item.reason for item in garbage}
    assert reasons.pop("pack/unfinished") == Reason.LEFT_BEHIND
    assert set(reasons.values()) == {Reason.UNUSED}
    before = stage_keys(house)
    assert keys(remove_garbage(house.database, house.artifacts, garbage)) == keys(garbage)
    assert not found(house)
    assert not (house.artifacts.root / "pack/unfinished").exists()
    for key in before:
        house.artifacts.open(key)

    house.add_version(3)
    update = house.finish(house.orchestrator(), house.add_update(model, 3))
    assert update.state == UpdateState.SUCCEEDED
    assert len(house.executor.executed) == len(set(house.executor.executed))


def model_dataset(house: House) -> str:
    with house.database.reading() as session:
        return datasets.dataset(session, "d").id


def test_nothing_young_goes(house: House) -> None:
    put(house.artifacts, "pack/young")
    put(house.artifacts, "pack/old")
    yesterday = time.time() - 25 * 3600
    os.utime(house.artifacts.root / "pack/old" / MANIFEST, (yesterday, yesterday))
    with house.artifacts.writing("pack/being-written") as directory:
        (directory / "half").write_text("half")
        assert keys(found(house, hours=24)) == {"pack/old"}


def test_what_an_attempt_left_beside_a_small_artifact_goes(house: House) -> None:
    house.add_model()
    with house.database.reading() as session:
        key = session.scalars(sa.select(DataVersion.artifact_key)).one()
    house.artifacts.publish_small(key, {"a": b"a"}, {})
    attempt = house.artifacts.root / key / "w-0123456789ab"
    attempt.mkdir()
    (attempt / "half").write_text("half")
    house.artifacts.open(key)
    assert [(item.key, item.reason) for item in found(house)] == [(key, Reason.LEFT_BEHIND)]
    assert collect(house) == {key}
    assert not attempt.exists()
    house.artifacts.open(key)


def test_an_unfinished_update_keeps_what_it_may_resume_from_until_it_ends_for_good(house: House) -> None:
    model = house.add_model()
    house.executor.hold.add(StageKind.TRAIN_BRANCH)
    update, orchestrator = house.add_update(model), house.orchestrator()
    while StageKind.TRAIN_BRANCH not in house.stages_running(update):
        orchestrator.tick()
    branch = training(house, update, "branch")
    resumable = f"{own_checkpoint_prefix(branch)}/000000095"
    of_trunk = f"{trunk_prefix(branch.line)}/000000010-x"
    put(house.artifacts, resumable)
    put(house.artifacts, of_trunk)
    assert resumable not in keys(found(house))

    house.executor.hold.clear()
    house.executor.fail[StageKind.TRAIN_BRANCH].append(FATAL)
    assert house.finish(orchestrator, update).state == UpdateState.FAILED
    assert collect(house) == {of_trunk}  # the trunk's stage has succeeded; the branch may be retried
    before = stage_keys(house)
    cancel_update(house.database, update)
    gone = collect(house)
    assert resumable in gone
    with house.database.reading() as session:
        [trunk] = session.scalars(sa.select(Checkpoint.artifact_key))
    assert trunk in before - gone


def test_of_old_versions_only_what_was_released_stays_where_so_few_are_wanted(house: House) -> None:
    model = house.add_model(versions=4)
    for number in (1, 2, 3, 4):
        house.executor.losses = lambda name, bad=number == 2: 9.0 if bad else 3.0
        house.finish(house.orchestrator(), house.add_update(model, number))
    with house.database.reading() as session:
        rows = session.scalars(sa.select(ModelVersion).order_by(ModelVersion.number)).all()
        states = [row.state for row in rows]
        ends = session.scalars(
            sa.select(Stage.key).where(Stage.kind == StageKind.TRAIN_BRANCH).order_by(Stage.created_at)
        ).all()
    assert states[1] == ModelVersionState.REJECTED
    assert collect(house) == set()
    assert collect(house, keep_versions=2) == {rows[1].export_key, ends[0], ends[1]}
    for row in (rows[0], rows[2], rows[3]):
        house.artifacts.open(row.export_key)


def test_an_abandoned_checkpoint_goes_unless_a_released_version_left_the_trunk_there(house: House) -> None:
    line(house, 2)
    with house.database.transaction() as session:
        first, second = session.scalars(sa.select(Checkpoint).order_by(Checkpoint.step)).all()
        for row in (first, second):
            row.state = CheckpointState.ABANDONED
        left = session.scalars(sa.select(ModelVersion).where(ModelVersion.checkpoint_id == second.id)).one()
        left.checkpoint_id = None
    assert collect(house) == {second.artifact_key}


def test_what_is_needed_by_the_time_it_would_be_removed_stays(house: House) -> None:
    house.add_model()
    put(house.artifacts, "data/adopted")
    garbage = found(house)
    assert keys(garbage) == {"data/adopted"}
    with house.database.transaction() as session:
        refer_to(house, session, "data/adopted")
    assert remove_garbage(house.database, house.artifacts, garbage) == []
    house.artifacts.open("data/adopted")


def test_who_is_about_to_refer_to_an_artifact_is_waited_for(house: House) -> None:
    house.add_model()
    put(house.artifacts, "data/adopted")
    garbage, removed = found(house), []
    thread = threading.Thread(
        target=lambda: removed.append(remove_garbage(house.database, house.artifacts, garbage))
    )
    with house.database.transaction() as session:
        share_artifacts(session)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        refer_to(house, session, "data/adopted")
    thread.join(30)
    assert removed == [[]]
    house.artifacts.open("data/adopted")


def refer_to(house: House, session: sa.orm.Session, key: str) -> None:
    row: DataVersion = add_data_version(session, datasets.dataset(session, "d"), 2)
    row.artifact_key = key
    session.flush()


def test_an_attempt_that_publishes_after_all_keeps_its_files(house: House) -> None:
    with house.artifacts.writing("pack/slow") as directory:
        (directory / "content").write_text("slow")
        garbage = found(house)
        assert [item.reason for item in garbage] == [Reason.LEFT_BEHIND]
        house.artifacts.publish("pack/slow", directory, {})
        assert remove_garbage(house.database, house.artifacts, garbage) == []
    house.artifacts.open("pack/slow")


def test_beside_a_manifest_that_cannot_be_read_nothing_is_touched(house: House) -> None:
    line(house, 1)
    key = sorted(stage_keys(house))[0]
    for name in ("w-aaaaaaaaaaaa", "w-bbbbbbbbbbbb"):
        folder = house.artifacts.root / key / name
        folder.mkdir()
        (folder / "content").write_text("?")
    (house.artifacts.root / key / MANIFEST).write_text("{")
    assert found(house) == []


def test_files_that_are_not_ours_stay(house: House) -> None:
    house.artifacts.root.mkdir(parents=True, exist_ok=True)
    for name in ("README", ".ingest-x/spool", "mounted/elsewhere/file"):
        path = house.artifacts.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not ours")
    assert found(house) == []
