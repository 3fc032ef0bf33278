"""Exclusion of data versions: lines rewind and plan without them, and existing versions stay."""

from typing import Any

import pytest

from api.schemas.models import Checkpoint
from api.schemas.updates import Update
from service.core.stage_specs import PackStage, StageKind, TrainStage
from service.core.states import CheckpointState, ModelVersionState, UpdateState
from service.store import tables
from tests.support.control_plane import ControlPlane

# For tests in which the kind of database makes no difference.
ON_SQLITE = pytest.mark.parametrize("each_plane", ["plane"], indirect=True)


@pytest.fixture
def model(each_plane: ControlPlane, name: str) -> str:
    """A line of three versions. The 1600 rows of a scripted pack make 100 steps per data version."""
    each_plane.add_dataset(name, [f"{name} a", "b"])
    each_plane.add_model(name, name)
    for text in ("c", "d"):
        each_plane.push(name, f"{name} {text}", f"{text}{text}").raise_for_status()
        each_plane.finish(name)
    return name


def exclude(
    plane: ControlPlane, dataset: str, number: int, reason: str = "spam"
) -> list[tuple[str, int, str]]:
    found = plane.client.exclude_version(dataset, number, reason)
    return [(row.model, row.number, str(row.state)) for row in found.affected_versions]


def updated(plane: ControlPlane, model: str) -> Update:
    """Run the line's next update to its end."""
    update = plane.client.start_update(model)
    plane.finish(model)
    return plane.client.update(update.id)


def spec_of(plane: ControlPlane, update: Update, name: str) -> dict[str, Any]:
    [stage] = [stage for stage in update.stages if stage.name == name]
    with plane.database.reading() as session:
        return session.get_one(tables.Stage, stage.id).spec


def trunk(plane: ControlPlane, model: str) -> list[Checkpoint]:
    return list(plane.client.checkpoints(model))


def test_the_trunk_rewinds_to_before_the_excluded_version_and_the_next_update_skips_it(
    each_plane: ControlPlane, model: str
) -> None:
    assert [row.step for row in trunk(each_plane, model)] == [90, 180, 270]
    assert exclude(each_plane, model, 2) == [(model, 2, "retired"), (model, 3, "released")]
    states = {row.step: row.state for row in trunk(each_plane, model)}
    live, abandoned = CheckpointState.LIVE, CheckpointState.ABANDONED
    assert states == {90: live, 180: abandoned, 270: abandoned}
    assert each_plane.client.model_version(model, "served").number == 3

    update = updated(each_plane, model)
    assert update.state == UpdateState.SUCCEEDED, update.error
    assert update.notes["excluded"] == [2]
    assert update.notes["rewound"] == {"from_step": 270, "to_step": 90}
    assert (update.data_version, update.branch_point, update.final_step) == (3, 180, 200)
    branch = TrainStage.model_validate(spec_of(each_plane, update, "branch"))
    assert [entry.number for entry in branch.ledger] == [1, 3]
    assert PackStage.model_validate(spec_of(each_plane, update, "pack-3")).earlier_keys == (
        PackStage.model_validate(spec_of(each_plane, update, "pack-1")).data_key,
    )
    version = each_plane.client.model_version(model, "served")
    assert (version.number, [row.slice for row in version.evaluations]) == (4, ["v1", "v3"])
    # The next update continues from there, without another note about the rewind.
    each_plane.push(model, f"{model} e", "ee").raise_for_status()
    each_plane.finish(model)
    after = list(each_plane.client.updates(model))[-1]
    assert "rewound" not in after.notes
    assert (after.branch_point, after.final_step) == (270, 300)


@ON_SQLITE
def test_existing_versions_stay_and_events_record_the_exclusion(each_plane: ControlPlane, model: str) -> None:
    before = list(each_plane.client.model_versions(model))
    exclude(each_plane, model, 2, "a mirror of another site")
    assert list(each_plane.client.model_versions(model)) == before
    data = each_plane.client.data_version(model, 2)
    assert (data.state, data.excluded_reason) == ("excluded", "a mirror of another site")
    assert data.excluded_at is not None
    recorded = [
        event
        for event in each_plane.client.events()
        if event.data.get("data_version") == 2
        and model in (event.data.get("dataset"), event.data.get("model"))
    ]
    kinds = [event.type for event in recorded]
    assert kinds[-2:] == ["data_version.excluded", "model.rewound"]
    assert recorded[-1].data | {"from_step": 270, "to_step": 90} == recorded[-1].data


@ON_SQLITE
def test_excluding_again_changes_nothing(each_plane: ControlPlane, model: str) -> None:
    first = exclude(each_plane, model, 2, "spam")
    updated(each_plane, model)
    checkpoints = trunk(each_plane, model)
    again = exclude(each_plane, model, 2, "another reason")
    assert [row[:2] for row in again] == [row[:2] for row in first]
    assert trunk(each_plane, model) == checkpoints
    assert each_plane.client.data_version(model, 2).excluded_reason == "spam"


@ON_SQLITE
def test_the_first_version_can_be_excluded(each_plane: ControlPlane, model: str) -> None:
    exclude(each_plane, model, 1)
    update = updated(each_plane, model)
    assert update.state == UpdateState.SUCCEEDED, update.error
    assert update.notes["rewound"] == {"from_step": 270, "to_step": 0}
    branch = TrainStage.model_validate(spec_of(each_plane, update, "branch"))
    assert [entry.number for entry in branch.ledger] == [2, 3]


def test_excluded_data_is_never_trained_again(each_plane: ControlPlane, model: str) -> None:
    exclude(each_plane, model, 3)
    answer = each_plane.http.post(f"/models/{model}/updates", json={"data_version": 3})
    assert (answer.status_code, answer.json()["detail"]) == (422, "data version 3 is excluded: spam")
    again = each_plane.push(model, f"{model} d", "dd")
    assert (again.status_code, again.json()["state"]) == (200, "excluded")
    # A document that only an excluded version has is not a duplicate.
    other = each_plane.push(model, f"{model} d", "new", f"{model} c")
    assert (other.status_code, other.json()["number"], other.json()["duplicates"]) == (201, 4, 1)
    each_plane.finish(model)
    assert each_plane.client.model_version(model, "served").data_version == 4
    for number in (1, 2, 4):
        exclude(each_plane, model, number)
    assert each_plane.http.post(f"/models/{model}/updates").status_code == 422


def test_no_branch_can_leave_a_checkpoint_that_has_read_excluded_data(
    each_plane: ControlPlane, model: str
) -> None:
    """Neither a new branch nor a pending one, because no ledger has the checkpoint's steps any more."""
    first, _, last = trunk(each_plane, model)
    waiting = each_plane.client.start_update(model, branch_from=last.id).id
    later = each_plane.client.start_update(model, branch_from=first.id, data_version=3).id
    exclude(each_plane, model, 2)
    refused = each_plane.http.post(f"/models/{model}/updates", json={"branch_from": last.id})
    assert refused.status_code == 422
    assert "has since been excluded" in refused.json()["detail"]
    each_plane.finish(model)
    failed = each_plane.client.update(waiting)
    assert failed.error is not None
    assert "excluded later" in failed.error.detail
    assert each_plane.client.update(later).state == UpdateState.SUCCEEDED


def test_updates_on_the_excluded_version_are_cancelled_and_later_ones_restart(
    each_plane: ControlPlane, model: str
) -> None:
    each_plane.executor.hold.add(StageKind.TRAIN_TRUNK)
    each_plane.push(model, f"{model} e", "ee").raise_for_status()
    [running] = each_plane.tick_until_running(model, StageKind.TRAIN_TRUNK)
    exclude(each_plane, model, 2)
    assert each_plane.client.update(running).state == UpdateState.CANCELLED
    again = list(each_plane.client.updates(model))[-1]
    assert (again.id != running, again.data_version, again.state) == (True, 4, UpdateState.PENDING)
    exclude(each_plane, model, 4)
    assert each_plane.client.update(again.id).state == UpdateState.CANCELLED
    each_plane.executor.hold.clear()
    update = updated(each_plane, model)
    assert (update.state, update.data_version) == (UpdateState.SUCCEEDED, 3)


@ON_SQLITE
@pytest.mark.parametrize("paradigm", ["continual", "wsd_s", "from_scratch", "merge"])
def test_lines_under_other_paradigms_rewind_too(
    each_plane: ControlPlane, model: str, name: str, paradigm: str
) -> None:
    other = f"{name}-{paradigm.replace('_', '-')}"
    each_plane.client.create_model(
        {"name": other, "dataset": model, "paradigm": {"name": paradigm}, "auto_update": False}
    )
    for number in (1, 2, 3):
        each_plane.client.start_update(other, data_version=number)
        each_plane.finish(other)
    assert [row for row in exclude(each_plane, model, 2) if row[0] == other] == [
        (other, 2, "retired"),
        (other, 3, "released"),
    ]
    update = updated(each_plane, other)
    assert update.state == UpdateState.SUCCEEDED, update.error
    assert each_plane.client.model_version(other, "served").number == 4
    [first, *_] = [stage for stage in update.stages if stage.kind in ("train", "train_trunk")]
    stage = TrainStage.model_validate(spec_of(each_plane, update, first.name))
    assert stage.from_step == (0 if paradigm == "from_scratch" else 100)
    assert [entry.number for entry in stage.ledger] == [1, 3]


@ON_SQLITE
def test_rewound_steps_count_as_wasted(each_plane: ControlPlane, model: str) -> None:
    before = each_plane.client.costs(model)
    exclude(each_plane, model, 2)
    rewound = each_plane.client.costs(model)
    # The trunk from step 90 to 270 is lost, but its branches made versions.
    assert rewound.totals.wasted.tokens - before.totals.wasted.tokens == 180 * 2048
    assert rewound.totals.spent.tokens + 180 * 2048 == before.totals.spent.tokens
    assert [row.from_scratch_tokens for row in rewound.versions] == [
        count * 2048 for count in (100, 100, 200)
    ]
    updated(each_plane, model)
    after = each_plane.client.costs(model)
    assert after.versions[-1].from_scratch_tokens == 200 * 2048
    assert after.forecast is not None


@ON_SQLITE
def test_invalid_exclusions_are_refused(each_plane: ControlPlane, model: str) -> None:
    def ask(number: int, body: object, dataset: str = model) -> int:
        path = f"/datasets/{dataset}/versions/{number}/exclude"
        return each_plane.http.post(path, json=body).status_code

    assert ask(9, {"reason": "x"}) == 404
    assert ask(1, {"reason": "x"}, dataset="nobody") == 404
    assert ask(1, {}) == 422
    assert each_plane.client.data_version(model, 1).state == "ready"
    assert each_plane.client.model_version(model, "served").state == ModelVersionState.RELEASED
