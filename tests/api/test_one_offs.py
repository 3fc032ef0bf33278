"""One-off updates: branches from any trunk checkpoint, and versions under another paradigm."""

from typing import Any

import pytest

from api.schemas.models import Checkpoint, ModelVersion
from api.schemas.updates import Update
from service.core.paradigm_specs import BranchSpec, PathSwitchingSpec
from service.core.states import ModelVersionState, UpdateState
from tests.support.control_plane import ControlPlane

# The 1600 rows of a scripted pack make 100 steps per data version. The first branch leaves at step 90.
SHORT = {"length": {"rule": "fixed", "fraction": 0.05}, "shape": "linear"}


# For tests in which the kind of database makes no difference.
ON_SQLITE = pytest.mark.parametrize("each_plane", ["plane"], indirect=True)


@pytest.fixture
def model(each_plane: ControlPlane, name: str) -> str:
    """A line of two versions."""
    each_plane.add_dataset(name, [f"{name} a", "b"])
    each_plane.add_model(name, name)
    each_plane.push(name, f"{name} c", "d").raise_for_status()
    each_plane.finish(name)
    return name


def trunk(plane: ControlPlane, model: str) -> list[Checkpoint]:
    return list(plane.client.checkpoints(model))


def versions(plane: ControlPlane, model: str) -> list[ModelVersion]:
    return list(plane.client.model_versions(model))


def one_off(plane: ControlPlane, model: str, **what: Any) -> Update:
    update = plane.client.start_update(model, **what)
    plane.finish(model)
    return plane.client.update(update.id)


def test_a_branch_from_a_checkpoint_makes_a_candidate_and_changes_nothing_else(
    each_plane: ControlPlane, model: str
) -> None:
    before = trunk(each_plane, model)
    served = each_plane.client.model_version(model, "served")
    update = one_off(each_plane, model, branch_from=before[0].id, decay=SHORT)
    assert (update.state, update.one_off, update.branch_from) == (UpdateState.SUCCEEDED, True, before[0].id)
    assert (update.data_version, update.branch_point, update.final_step) == (1, 90, 98)
    assert [str(stage.kind) for stage in update.stages] == [
        *("tokenizer", "pack", "train_branch", "export", "evaluate")
    ]
    made = versions(each_plane, model)[-1]
    assert (made.number, made.state, made.gate) == (3, ModelVersionState.CANDIDATE, None)
    assert made.branch_point.checkpoint == before[0].id
    assert trunk(each_plane, model) == before
    assert each_plane.client.model_version(model, "served") == served


@ON_SQLITE
def test_missing_fields_of_a_decay_come_from_the_model(each_plane: ControlPlane, name: str) -> None:
    own = {
        "length": {"rule": "fixed", "fraction": 0.3},
        "shape": "cosine",
        "floor": 0.1,
        "replay_fraction": 0.5,
        "replay_budget": "grown",
    }
    each_plane.add_dataset(name, [f"{name} a", "b"])
    each_plane.add_model(name, name, paradigm={"name": "path_switching", "decay": own})
    [start] = trunk(each_plane, name)
    decays: list[dict[str, Any]] = [
        {},
        {"replay_fraction": 0.0},
        {"length": {"rule": "fixed", "fraction": 0.05}},
        {"shape": "linear"},
    ]
    made = [one_off(each_plane, name, branch_from=start.id, decay=decay) for decay in decays]
    for update, changes in zip(
        made, ({}, decays[1], decays[2], {"shape": "linear", "floor": 0.0}), strict=True
    ):
        assert update.paradigm == PathSwitchingSpec(decay=BranchSpec.model_validate(own | changes))


def test_a_one_off_branch_can_be_released_and_does_not_affect_the_line(
    each_plane: ControlPlane, model: str
) -> None:
    start = trunk(each_plane, model)
    one_off(each_plane, model, branch_from=start[0].id, decay=SHORT)
    each_plane.client.release(model, 3)
    each_plane.finish(model)
    assert each_plane.client.model_version(model, "served").number == 3
    each_plane.push(model, f"{model} e", "f").raise_for_status()
    each_plane.finish(model)
    newest = versions(each_plane, model)[-1]
    assert (newest.number, newest.data_version, newest.state) == (4, 3, ModelVersionState.RELEASED)
    assert newest.branch_point.step > start[-1].step


@ON_SQLITE
def test_a_branch_can_read_into_later_data(each_plane: ControlPlane, model: str) -> None:
    start = trunk(each_plane, model)[0]
    longer = {"length": {"rule": "fixed", "fraction": 0.6}}
    refused = each_plane.http.post(
        f"/models/{model}/updates", json={"branch_from": start.id, "decay": longer}
    )
    assert refused.status_code == 422
    assert "reads past the end of data version 1, step 100" in refused.json()["detail"]
    update = one_off(each_plane, model, branch_from=start.id, decay=longer, data_version=2)
    assert (update.state, update.branch_point, update.final_step) == (UpdateState.SUCCEEDED, 90, 150)


@ON_SQLITE
def test_a_branch_cannot_start_at_a_checkpoint_of_another_model_or_of_later_data(
    each_plane: ControlPlane, model: str
) -> None:
    last = trunk(each_plane, model)[-1]
    other = f"{model}-other"
    each_plane.add_model(other, model)
    assert each_plane.http.post(f"/models/{other}/updates", json={"branch_from": last.id}).status_code == 404
    early = {"branch_from": last.id, "data_version": 1}
    assert each_plane.http.post(f"/models/{model}/updates", json=early).status_code == 422


@ON_SQLITE
@pytest.mark.parametrize(
    ("paradigm", "steps"),
    [
        ({"name": "from_scratch"}, (0, 200)),
        ({"name": "continual"}, (100, 200)),
        ({"name": "wsd_s"}, (180, 200)),
        ({"name": "path_switching", "decay": {"length": {"rule": "fixed", "fraction": 0.4}}}, (160, 200)),
        ({"name": "merge", "k": 2}, (200, 200)),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_a_version_under_another_paradigm_does_not_affect_the_line(
    each_plane: ControlPlane, model: str, paradigm: dict[str, Any], steps: tuple[int, int]
) -> None:
    before = trunk(each_plane, model)
    update = one_off(each_plane, model, paradigm=paradigm)
    assert update.state == UpdateState.SUCCEEDED, update.error
    assert (update.one_off, update.branch_point, update.final_step) == (True, *steps)
    assert trunk(each_plane, model) == before
    assert each_plane.client.model_version(model, "served").number == 3
    each_plane.push(model, f"{model} g", "h").raise_for_status()
    each_plane.finish(model)
    newest = versions(each_plane, model)[-1]
    assert (newest.data_version, newest.state) == (3, ModelVersionState.RELEASED)
    assert newest.branch_point.step == 270


@ON_SQLITE
def test_from_scratch_reads_every_row_once_although_the_line_replays(
    each_plane: ControlPlane, name: str
) -> None:
    each_plane.add_dataset(name, [f"{name} a", "b"])
    each_plane.add_model(name, name, training={"replay_fraction": 0.2})
    each_plane.push(name, f"{name} c", "d").raise_for_status()
    each_plane.finish(name)
    before = trunk(each_plane, name)
    assert each_plane.client.model_version(name, 2).final_step == 100 + 125
    update = one_off(each_plane, name, paradigm={"name": "from_scratch"})
    assert (update.state, update.branch_point, update.final_step) == (UpdateState.SUCCEEDED, 0, 200)
    assert trunk(each_plane, name) == before
    each_plane.push(name, f"{name} e", "f").raise_for_status()
    each_plane.finish(name)
    newest = versions(each_plane, name)[-1]
    assert (newest.data_version, newest.final_step) == (3, 100 + 2 * 125)


@ON_SQLITE
def test_the_cost_of_one_offs_is_extra(each_plane: ControlPlane, model: str) -> None:
    before = each_plane.client.costs(model)
    one_off(each_plane, model, branch_from=trunk(each_plane, model)[0].id, decay=SHORT)
    one_off(each_plane, model, paradigm={"name": "from_scratch"})
    after = each_plane.client.costs(model)
    assert after.totals.extra.tokens == (8 + 200) * 2048
    assert after.totals.spent == before.totals.spent
    assert after.ratio_to_from_scratch == before.ratio_to_from_scratch
    assert after.forecast == before.forecast
