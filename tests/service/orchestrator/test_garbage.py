"""Garbage collection removes what no row needs, and nothing that a line resumes from or a new reference names."""

import os
import threading
import time
from collections.abc import Sequence
from functools import partial

import sqlalchemy as sa

from service.artifacts import Artifacts
from service.artifacts.garbage import Garbage, Reason, find_garbage, remove_garbage
from service.core.executor import RunError
from service.core.manifest import MANIFEST
from service.core.plan import own_checkpoint_prefix, trunk_prefix
from service.core.stage_specs import StageKind, TrainStage
from service.core.states import CheckpointState, ModelVersionState, UpdateState
from service.operations.updates import cancel_update
from service.store import datasets
from service.store.in_use import share_artifacts
from service.store.tables import Checkpoint, DataVersion, ModelVersion, Stage
from tests.service.orchestrator.conftest import Harness
from tests.support.rows import add_data_version

FATAL = RunError("", "diverged", "loss is not finite", retryable=False)


def publish(artifacts: Artifacts, key: str) -> None:
    with artifacts.writing(key) as directory:
        (directory / "content").write_text(key)
        artifacts.publish(key, directory, {})


def garbage_in(harness: Harness, *, hours: float = 0, keep_versions: int | None = None) -> list[Garbage]:
    return find_garbage(
        harness.database, harness.artifacts, older_than_seconds=hours * 3600 - 1, keep_versions=keep_versions
    )


def keys(garbage: Sequence[Garbage]) -> set[str]:
    return {item.key for item in garbage}


def collect(harness: Harness, keep_versions: int | None = None) -> set[str]:
    garbage = garbage_in(harness, keep_versions=keep_versions)
    return keys(remove_garbage(harness.database, harness.artifacts, garbage, keep_versions=keep_versions))


def add_trained_model(harness: Harness, versions: int) -> str:
    """Add a model whose updates to that many data versions have all succeeded."""
    model = harness.add_model(versions=versions)
    for number in range(1, versions + 1):
        harness.finish(harness.orchestrator(), harness.add_update(model, number))
    return model


def train_stage(harness: Harness, update: str, name: str) -> TrainStage:
    return TrainStage.model_validate(harness.stages(update)[name].spec)


def constant_loss(loss: float, slice_name: str) -> float:
    return loss


def stage_keys(harness: Harness) -> set[str]:
    with harness.database.reading() as session:
        return set(session.scalars(sa.select(Stage.key).where(Stage.key.is_not(None))))


def test_unreferenced_artifacts_are_removed_and_the_line_continues(harness: Harness) -> None:
    model = add_trained_model(harness, 2)
    for number in (1, 2):
        with harness.database.reading() as session:
            publish(harness.artifacts, datasets.version(session, model_dataset(harness), number).artifact_key)
    with harness.database.reading() as session:
        last = session.scalars(sa.select(Stage).where(Stage.kind == StageKind.TRAIN_BRANCH)).all()[-1]
    branch = TrainStage.model_validate(last.spec)
    periodic = {f"{trunk_prefix(branch.line)}/000000010-x", f"{own_checkpoint_prefix(branch)}/000000200"}
    for key in {*periodic, "pack/of-a-lost-race"}:
        publish(harness.artifacts, key)
    unfinished = harness.artifacts.root / "pack/unfinished/w-0123456789ab/deep/half"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_text("half")

    garbage = garbage_in(harness)
    assert keys(garbage) == {*periodic, "pack/of-a-lost-race", "pack/unfinished"}
    reasons = {item.key: item.reason for item in garbage}
    assert reasons.pop("pack/unfinished") == Reason.LEFT_BEHIND
    assert set(reasons.values()) == {Reason.UNUSED}
    before = stage_keys(harness)
    assert keys(remove_garbage(harness.database, harness.artifacts, garbage)) == keys(garbage)
    assert not garbage_in(harness)
    assert not (harness.artifacts.root / "pack/unfinished").exists()
    for key in before:
        harness.artifacts.open(key)

    harness.add_version(3)
    update = harness.finish(harness.orchestrator(), harness.add_update(model, 3))
    assert update.state == UpdateState.SUCCEEDED
    assert len(harness.executor.executed) == len(set(harness.executor.executed))


def model_dataset(harness: Harness) -> str:
    with harness.database.reading() as session:
        return datasets.dataset(session, "d").id


def test_recent_files_are_kept(harness: Harness) -> None:
    publish(harness.artifacts, "pack/young")
    publish(harness.artifacts, "pack/old")
    yesterday = time.time() - 25 * 3600
    os.utime(harness.artifacts.root / "pack/old" / MANIFEST, (yesterday, yesterday))
    with harness.artifacts.writing("pack/being-written") as directory:
        (directory / "half").write_text("half")
        assert keys(garbage_in(harness, hours=24)) == {"pack/old"}


def test_orphaned_files_beside_an_inlined_artifact_are_removed(harness: Harness) -> None:
    harness.add_model()
    with harness.database.reading() as session:
        key = session.scalars(sa.select(DataVersion.artifact_key)).one()
    harness.artifacts.publish_small(key, {"a": b"a"}, {})
    attempt = harness.artifacts.root / key / "w-0123456789ab"
    attempt.mkdir()
    (attempt / "half").write_text("half")
    harness.artifacts.open(key)
    assert [(item.key, item.reason) for item in garbage_in(harness)] == [(key, Reason.LEFT_BEHIND)]
    assert collect(harness) == {key}
    assert not attempt.exists()
    harness.artifacts.open(key)


def test_an_unfinished_update_keeps_its_checkpoints_until_it_is_cancelled(harness: Harness) -> None:
    model = harness.add_model()
    harness.executor.hold.add(StageKind.TRAIN_BRANCH)
    update, orchestrator = harness.add_update(model), harness.orchestrator()
    while StageKind.TRAIN_BRANCH not in harness.stages_running(update):
        orchestrator.tick()
    branch = train_stage(harness, update, "branch")
    resumable = f"{own_checkpoint_prefix(branch)}/000000095"
    trunk_checkpoint = f"{trunk_prefix(branch.line)}/000000010-x"
    publish(harness.artifacts, resumable)
    publish(harness.artifacts, trunk_checkpoint)
    assert resumable not in keys(garbage_in(harness))

    harness.executor.hold.clear()
    harness.executor.fail[StageKind.TRAIN_BRANCH].append(FATAL)
    assert harness.finish(orchestrator, update).state == UpdateState.FAILED
    # The trunk stage has succeeded, but the branch may be retried.
    assert collect(harness) == {trunk_checkpoint}
    before = stage_keys(harness)
    cancel_update(harness.database, update)
    removed = collect(harness)
    assert resumable in removed
    with harness.database.reading() as session:
        [trunk] = session.scalars(sa.select(Checkpoint.artifact_key))
    assert trunk in before - removed


def test_keep_versions_removes_old_checkpoints_and_unreleased_exports(harness: Harness) -> None:
    model = harness.add_model(versions=4)
    for number in (1, 2, 3, 4):
        harness.executor.losses = partial(constant_loss, 9.0 if number == 2 else 3.0)
        harness.finish(harness.orchestrator(), harness.add_update(model, number))
    with harness.database.reading() as session:
        rows = session.scalars(sa.select(ModelVersion).order_by(ModelVersion.number)).all()
        states = [row.state for row in rows]
        ends = session.scalars(
            sa.select(Stage.key).where(Stage.kind == StageKind.TRAIN_BRANCH).order_by(Stage.created_at)
        ).all()
    assert states[1] == ModelVersionState.REJECTED
    assert collect(harness) == set()
    assert collect(harness, keep_versions=2) == {rows[1].export_key, ends[0], ends[1]}
    for row in (rows[0], rows[2], rows[3]):
        harness.artifacts.open(row.export_key)


def test_an_abandoned_checkpoint_is_removed_unless_a_released_version_branched_from_it(
    harness: Harness,
) -> None:
    add_trained_model(harness, 2)
    with harness.database.transaction() as session:
        first, second = session.scalars(sa.select(Checkpoint).order_by(Checkpoint.step)).all()
        for row in (first, second):
            row.state = CheckpointState.ABANDONED
        branched = session.scalars(
            sa.select(ModelVersion).where(ModelVersion.checkpoint_id == second.id)
        ).one()
        branched.checkpoint_id = None
    assert collect(harness) == {second.artifact_key}


def test_an_artifact_that_comes_into_use_before_its_removal_is_kept(harness: Harness) -> None:
    harness.add_model()
    publish(harness.artifacts, "data/adopted")
    garbage = garbage_in(harness)
    assert keys(garbage) == {"data/adopted"}
    with harness.database.transaction() as session:
        refer_to(harness, session, "data/adopted")
    assert remove_garbage(harness.database, harness.artifacts, garbage) == []
    harness.artifacts.open("data/adopted")


def test_removal_waits_for_a_transaction_that_is_about_to_use_an_artifact(harness: Harness) -> None:
    harness.add_model()
    publish(harness.artifacts, "data/adopted")
    garbage, removed = garbage_in(harness), []
    thread = threading.Thread(
        target=lambda: removed.append(remove_garbage(harness.database, harness.artifacts, garbage))
    )
    with harness.database.transaction() as session:
        share_artifacts(session)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        refer_to(harness, session, "data/adopted")
    thread.join(30)
    assert removed == [[]]
    harness.artifacts.open("data/adopted")


def refer_to(harness: Harness, session: sa.orm.Session, key: str) -> None:
    row: DataVersion = add_data_version(session, datasets.dataset(session, "d"), 2)
    row.artifact_key = key
    session.flush()


def test_an_attempt_that_publishes_before_the_removal_keeps_its_files(harness: Harness) -> None:
    with harness.artifacts.writing("pack/slow") as directory:
        (directory / "content").write_text("slow")
        garbage = garbage_in(harness)
        assert [item.reason for item in garbage] == [Reason.LEFT_BEHIND]
        harness.artifacts.publish("pack/slow", directory, {})
        assert remove_garbage(harness.database, harness.artifacts, garbage) == []
    harness.artifacts.open("pack/slow")


def test_nothing_is_removed_beside_an_unreadable_manifest(harness: Harness) -> None:
    add_trained_model(harness, 1)
    key = sorted(stage_keys(harness))[0]
    for name in ("w-aaaaaaaaaaaa", "w-bbbbbbbbbbbb"):
        folder = harness.artifacts.root / key / name
        folder.mkdir()
        (folder / "content").write_text("?")
    (harness.artifacts.root / key / MANIFEST).write_text("{")
    assert garbage_in(harness) == []


def test_files_outside_the_layout_are_kept(harness: Harness) -> None:
    harness.artifacts.root.mkdir(parents=True, exist_ok=True)
    for name in ("README", ".ingest-x/spool", "mounted/elsewhere/file"):
        path = harness.artifacts.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not ours")
    assert garbage_in(harness) == []
