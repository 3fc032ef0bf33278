"""Damaged artifacts are made again and the update continues. If that is impossible, the update fails with the reason."""

from pathlib import Path

import pytest

from service.core.errors import ArtifactCorrupt
from service.core.executor import RunError
from service.core.manifest import MANIFEST
from service.core.retry import MAX_ATTEMPTS
from service.core.stage_specs import StageKind
from service.core.states import UpdateState
from service.store import events, lines
from tests.service.orchestrator.conftest import Harness

DAMAGE = RunError("", ArtifactCorrupt.code, "content differs from its manifest", retryable=True)


def until_branch_runs(harness: Harness) -> str:
    harness.executor.hold.add(StageKind.TRAIN_BRANCH)
    update, orchestrator = harness.add_update(harness.add_model()), harness.orchestrator()
    # Collect the trunk too, because the branch waits in the same run.
    while harness.stages_running(update) != {StageKind.TRAIN_BRANCH}:
        orchestrator.tick()
    harness.executor.hold.clear()
    harness.executor.fail[StageKind.TRAIN_BRANCH].append(DAMAGE)
    harness.expire_leases()
    return update


def content(harness: Harness, key: str) -> Path:
    folder = harness.artifacts.open(key)
    return next(path for path in folder.iterdir())


def key_of(harness: Harness, update: str, name: str) -> str:
    key = harness.stages(update)[name].key
    assert key is not None
    return key


def events_of_kind(harness: Harness, kind: str) -> list[dict[str, object]]:
    with harness.database.reading() as session:
        return [row.data for row in events.page(session, 0, 1000) if row.type == kind]


@pytest.mark.parametrize("name", ["trunk", "pack-1", "tokenizer"])
@pytest.mark.parametrize("how", ["cut", "flipped", "missing", "manifest gone"])
def test_a_damaged_input_is_made_again_by_its_stage(harness: Harness, name: str, how: str) -> None:
    update = until_branch_runs(harness)
    key = key_of(harness, update, name)
    path = content(harness, key)
    good = path.read_bytes()
    match how:
        case "cut":
            path.write_bytes(good[:-1])
        case "flipped":
            path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        case "missing":
            path.unlink()
        case "manifest gone":
            (harness.artifacts.root / key / MANIFEST).unlink()
    row = harness.finish(harness.orchestrator(), update)
    stages = harness.stages(update)
    assert row.state == UpdateState.SUCCEEDED, row.error
    assert harness.executor.executed.count(key) == 2
    assert stages["branch"].attempt == 2
    assert [event["stage"] for event in events_of_kind(harness, "stage.made_again")] == [stages[name].id]
    harness.artifacts.open(key)


def test_repair_keeps_the_rows_of_the_damaged_stage_and_its_readers(harness: Harness) -> None:
    update = until_branch_runs(harness)
    content(harness, key_of(harness, update, "trunk")).write_bytes(b"")
    harness.finish(harness.orchestrator(), update)
    with harness.database.reading() as session:
        model = harness.update(update).model_id
        assert len(lines.live_checkpoints(session, model)) == 1


def test_an_unreadable_manifest_is_unpublished_and_made_again(harness: Harness) -> None:
    model = harness.add_model(versions=2)
    harness.finish(harness.orchestrator(), harness.add_update(model, 1))
    update = harness.add_update(model, 2)
    broken = harness.artifacts.root / harness.artifacts.keys("pack")[0] / MANIFEST
    broken.write_bytes(broken.read_bytes()[:-10])
    row = harness.finish(harness.orchestrator(), update)
    assert row.state == UpdateState.SUCCEEDED, row.error
    assert harness.artifacts.keys("pack")


def test_repair_stops_when_no_attempts_are_left(harness: Harness) -> None:
    update = until_branch_runs(harness)
    key = key_of(harness, update, "trunk")
    harness.executor.fail[StageKind.TRAIN_BRANCH] = [DAMAGE] * 20
    orchestrator = harness.orchestrator()
    for _ in range(60):
        if key in harness.artifacts.keys(key.rpartition("/")[0]):
            content_of = harness.artifacts.manifest(key)
            assert content_of is not None
            folder = harness.artifacts.root / key / content_of.directory
            next(folder.iterdir()).write_bytes(b"damaged again")
        orchestrator.tick()
        harness.skip_waits()
    row = harness.update(update)
    assert row.state == UpdateState.FAILED
    assert row.error is not None
    assert row.error["code"] == ArtifactCorrupt.code
    assert harness.stages(update)["branch"].attempt == MAX_ATTEMPTS


def test_without_a_damaged_input_the_attempt_fails(harness: Harness) -> None:
    update = until_branch_runs(harness)
    harness.executor.fail[StageKind.TRAIN_BRANCH] = [DAMAGE] * 20
    row = harness.finish(harness.orchestrator(), update)
    assert row.state == UpdateState.FAILED
    assert len(harness.executor.executed) == len(set(harness.executor.executed))
    assert events_of_kind(harness, "stage.made_again") == []
