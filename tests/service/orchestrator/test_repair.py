"""What is found damaged is made again, and the update goes on; what cannot be made again ends it with the reason."""

from pathlib import Path

import pytest

from service.core.errors import ArtifactCorrupt
from service.core.executor import RunError
from service.core.manifest import MANIFEST
from service.core.retry import MAX_ATTEMPTS
from service.core.stage_specs import StageKind
from service.core.states import UpdateState
from service.store import events, lines
from tests.service.orchestrator.conftest import House

FOUND = RunError("", ArtifactCorrupt.code, "content differs from its manifest", retryable=True)


def until_branch_runs(house: House) -> str:
    house.executor.hold.add(StageKind.TRAIN_BRANCH)
    update, orchestrator = house.add_update(house.add_model()), house.orchestrator()
    # The trunk has to have been collected, too: the branch waits in the same run.
    while house.stages_running(update) != {StageKind.TRAIN_BRANCH}:
        orchestrator.tick()
    house.executor.hold.clear()
    house.executor.fail[StageKind.TRAIN_BRANCH].append(FOUND)
    house.expire_leases()
    return update


def content(house: House, key: str) -> Path:
    folder = house.artifacts.open(key)
    return next(path for path in folder.iterdir())


def key_of(house: House, update: str, name: str) -> str:
    key = house.stages(update)[name].key
    assert key is not None
    return key


def told(house: House, kind: str) -> list[dict[str, object]]:
    with house.database.reading() as session:
        return [row.data for row in events.page(session, 0, 1000) if row.type == kind]


@pytest.mark.parametrize("name", ["trunk", "pack-1", "tokenizer"])
@pytest.mark.parametrize("how", ["cut", "flipped", "missing", "manifest gone"])
def test_a_damaged_input_is_made_again_by_its_stage(house: House, name: str, how: str) -> None:
    update = until_branch_runs(house)
    key = key_of(house, update, name)
    path = content(house, key)
    good = path.read_bytes()
    match how:
        case "cut":
            path.write_bytes(good[:-1])
        case "flipped":
            path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        case "missing":
            path.unlink()
        case "manifest gone":
            (house.artifacts.root / key / MANIFEST).unlink()
    row = house.finish(house.orchestrator(), update)
    stages = house.stages(update)
    assert row.state == UpdateState.SUCCEEDED, row.error
    assert house.executor.executed.count(key) == 2
    assert stages["branch"].attempt == 2
    assert [event["stage"] for event in told(house, "stage.made_again")] == [stages[name].id]
    house.artifacts.open(key)


def test_what_was_damaged_and_what_reads_it_keep_their_rows(house: House) -> None:
    update = until_branch_runs(house)
    content(house, key_of(house, update, "trunk")).write_bytes(b"")
    house.finish(house.orchestrator(), update)
    with house.database.reading() as session:
        model = house.update(update).model_id
        assert len(lines.live_checkpoints(session, model)) == 1


def test_a_manifest_that_cannot_be_read_is_in_nobodys_way(house: House) -> None:
    model = house.add_model(versions=2)
    house.finish(house.orchestrator(), house.add_update(model, 1))
    update = house.add_update(model, 2)
    broken = house.artifacts.root / house.artifacts.keys("pack")[0] / MANIFEST
    broken.write_bytes(broken.read_bytes()[:-10])
    row = house.finish(house.orchestrator(), update)
    assert row.state == UpdateState.SUCCEEDED, row.error
    assert house.artifacts.keys("pack")


def test_it_does_not_go_on_for_ever(house: House) -> None:
    update = until_branch_runs(house)
    key = key_of(house, update, "trunk")
    house.executor.fail[StageKind.TRAIN_BRANCH] = [FOUND] * 20
    orchestrator = house.orchestrator()
    for _ in range(60):
        if key in house.artifacts.keys(key.rpartition("/")[0]):
            content_of = house.artifacts.manifest(key)
            assert content_of is not None
            folder = house.artifacts.root / key / content_of.directory
            next(folder.iterdir()).write_bytes(b"damaged again")
        orchestrator.tick()
        house.skip_waits()
    row = house.update(update)
    assert row.state == UpdateState.FAILED
    assert row.error is not None
    assert row.error["code"] == ArtifactCorrupt.code
    assert house.stages(update)["branch"].attempt == MAX_ATTEMPTS


def test_where_nothing_of_its_own_is_damaged_the_attempt_has_failed(house: House) -> None:
    update = until_branch_runs(house)
    house.executor.fail[StageKind.TRAIN_BRANCH] = [FOUND] * 20
    row = house.finish(house.orchestrator(), update)
    assert row.state == UpdateState.FAILED
    assert len(house.executor.executed) == len(set(house.executor.executed))
    assert told(house, "stage.made_again") == []
