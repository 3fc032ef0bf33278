"""Updates over HTTP: start, list, cancel and retry them, and read their metrics."""

from itertools import pairwise

import pytest

from api.schemas.updates import MetricPoint, Stage
from service.core.executor import RunError
from service.core.stage_specs import StageKind
from service.store import metrics
from tests.support.control_plane import ControlPlane

STAGES = ["tokenizer", "pack", "train_trunk", "train_branch", "export", "evaluate", "gate", "release"]


# For tests in which the kind of database makes no difference.
ON_SQLITE = pytest.mark.parametrize("each_plane", ["plane"], indirect=True)


@pytest.fixture
def model(each_plane: ControlPlane, name: str) -> str:
    """A model on two data versions without automatic updates."""
    each_plane.add_dataset(name, [f"{name} a", "b"], [f"{name} c", "d"])
    each_plane.client.create_model({"name": name, "dataset": name, "auto_update": False})
    return name


def test_an_update_trains_the_newest_data_version_by_default(each_plane: ControlPlane, model: str) -> None:
    answer = each_plane.http.post(f"/models/{model}/updates", json={"data_version": 1})
    assert answer.status_code == 202
    update = answer.json()
    assert update == {
        "id": update["id"],
        "model": model,
        "data_version": 1,
        "paradigm": update["paradigm"],
        "one_off": False,
        "branch_from": None,
        "state": "pending",
        "model_version": None,
        "branch_point": None,
        "final_step": None,
        "notes": {},
        "error": None,
        "stages": [],
        "created_at": update["created_at"],
        "started_at": None,
        "finished_at": None,
    }
    assert update["paradigm"]["name"] == "path_switching"
    assert each_plane.http.get(f"/updates/{update['id']}").json() == update
    without_body = each_plane.http.post(f"/models/{model}/updates")
    assert without_body.json()["data_version"] == 2
    listed = each_plane.http.get(f"/models/{model}/updates").json()["data"]
    assert [row["id"] for row in listed] == [update["id"], without_body.json()["id"]]


def test_a_finished_update_shows_its_stages_in_topological_order(
    each_plane: ControlPlane, model: str
) -> None:
    update_id = each_plane.client.start_update(model, data_version=1).id
    each_plane.finish(model)
    update = each_plane.http.get(f"/updates/{update_id}").json()
    assert (update["state"], update["model_version"]) == ("succeeded", 1)
    assert update["finished_at"] >= update["started_at"] >= update["created_at"]
    assert [stage["kind"] for stage in update["stages"]] == STAGES
    placed: set[str] = set()
    for stage in update["stages"]:
        assert placed.issuperset(stage["needs"])
        placed.add(stage["id"])
        assert set(stage) == {
            "id",
            "name",
            "kind",
            "state",
            "attempt",
            "reused",
            "needs",
            "progress",
            "error",
            "started_at",
            "finished_at",
        }
        assert (stage["state"], stage["error"], stage["reused"]) == ("succeeded", None, False)
    trunk = update["stages"][2]
    assert set(trunk["progress"]) == {
        "step",
        "total_steps",
        "loss",
        "learning_rate",
        "tokens_per_second",
        "eta_seconds",
    }
    assert update["stages"][-1]["progress"] is None


def test_finished_stages_of_another_model_are_reused(each_plane: ControlPlane, model: str) -> None:
    each_plane.client.start_update(model, data_version=1)
    each_plane.finish(model)
    twin = f"{model}-twin"
    each_plane.client.create_model({"name": twin, "dataset": model, "auto_update": False})
    update_id = each_plane.client.start_update(twin, data_version=1).id
    each_plane.finish(twin)
    done = {str(stage.kind): stage.reused for stage in each_plane.client.update(update_id).stages}
    assert done["train_trunk"]
    assert done["train_branch"]
    version = each_plane.client.model_version(twin, 1)
    assert version.cost.reused_tokens == version.cost.tokens > 0
    assert version.cost.device_seconds == 0


def test_invalid_updates_are_refused(each_plane: ControlPlane, model: str) -> None:
    def start(body: object, of: str = model) -> int:
        return each_plane.http.post(f"/models/{of}/updates", json=body).status_code

    assert start({}, of="nobody") == 404
    assert start({"data_version": 9}) == 404
    assert start({"data_version": 0}) == 422
    assert start({"data_version": 1 << 40}) == 422
    assert start({"branch_from": "ckp_1"}) == 404
    assert start({"decay": {"shape": "linear"}}) == 422
    assert start({"branch_from": "ckp_1", "paradigm": {"name": "merge"}}) == 422
    assert start({"paradigm": {"name": "unheard_of"}}) == 422
    each_plane.client.start_update(model, data_version=2)
    each_plane.finish(model)
    assert start({"data_version": 1}) == 422  # the trunk is past it
    empty = f"{model}-empty"
    each_plane.client.create_dataset(empty)
    each_plane.client.create_model({"name": empty, "dataset": empty})
    assert start({}, of=empty) == 422


def test_an_update_can_be_cancelled_once(each_plane: ControlPlane, model: str) -> None:
    update_id = each_plane.client.start_update(model).id
    cancelled = each_plane.http.post(f"/updates/{update_id}/cancel")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
    assert cancelled.json()["finished_at"] is not None
    assert each_plane.http.post(f"/updates/{update_id}/cancel").status_code == 200
    assert each_plane.http.post(f"/updates/{update_id}/retry").status_code == 409
    assert each_plane.http.post("/updates/upd_unknown/cancel").status_code == 404


def test_a_failed_update_shows_its_error_and_can_be_retried(each_plane: ControlPlane, model: str) -> None:
    error = RunError("", "diverged", "the loss is nan at step 7", retryable=False)
    each_plane.fail_next(StageKind.TRAIN_BRANCH, error)
    update_id = each_plane.client.start_update(model, data_version=1).id
    each_plane.finish(model)
    update = each_plane.http.get(f"/updates/{update_id}").json()
    assert update["state"] == "failed"
    assert (update["error"]["code"], update["error"]["stage"]) == ("diverged", "branch")
    failed = next(stage for stage in update["stages"] if stage["state"] == "failed")
    assert failed["kind"] == "train_branch"
    assert failed["error"] == {
        "code": "diverged",
        "detail": "the loss is nan at step 7",
        "stage": None,
        "attempt": 1,
    }
    assert each_plane.http.post(f"/updates/{update_id}/retry").json()["state"] == "running"
    each_plane.finish(model)
    assert each_plane.http.get(f"/updates/{update_id}").json()["state"] == "succeeded"
    assert each_plane.http.post(f"/updates/{update_id}/cancel").status_code == 409


@pytest.mark.parametrize("count", [0, 2000, 2001, 5000])
def test_metrics_are_thinned_evenly_above_2000_points(
    each_plane: ControlPlane, model: str, count: int
) -> None:
    update_id = each_plane.client.start_update(model, data_version=1).id
    each_plane.finish(model)
    stage = next(s for s in each_plane.client.update(update_id).stages if s.kind == "evaluate")
    points = [
        {"step": 100 + i, "loss": 1 / (i + 1), "learning_rate": 0.1, "grad_norm": 1, "tokens_per_second": 9}
        for i in range(count)
    ]
    with each_plane.database.transaction() as session:
        metrics.record_points(session, stage.id, points)
    answer = each_plane.http.get(f"/updates/{update_id}/metrics", params={"stage": stage.id}).json()
    assert set(answer) == {"data"}
    got = answer["data"]
    assert len(got) == min(count, 2000)
    if count <= 2000:
        assert got == points
        return
    assert (got[0], got[-1]) == (points[0], points[-1])
    steps = [point["step"] for point in got]
    gaps = {later - earlier for earlier, later in pairwise(steps)}
    assert max(gaps) - min(gaps) <= 1


def test_metrics_need_a_stage_of_the_update(each_plane: ControlPlane, model: str) -> None:
    update_id = each_plane.client.start_update(model, data_version=1).id
    each_plane.finish(model)
    trunk = each_plane.client.update(update_id).stages[2]
    assert [point.loss for point in each_plane.client.metrics(update_id, trunk.id)] == [3.0]
    path = f"/updates/{update_id}/metrics"
    assert each_plane.http.get(path).status_code == 422
    assert each_plane.http.get(path, params={"stage": "stg_unknown"}).status_code == 404
    assert each_plane.http.get("/updates/upd_x/metrics", params={"stage": trunk.id}).status_code == 404


def test_metrics_of_a_reused_stage_cover_exactly_its_own_steps(each_plane: ControlPlane, model: str) -> None:
    """The other line trained the trunk in one stage, up to the end of the second segment of this line."""
    in_one = each_plane.client.start_update(model, data_version=2).id
    each_plane.finish(model)
    twin = f"{model}-twin"
    each_plane.client.create_model({"name": twin, "dataset": model, "auto_update": False})
    updates = []
    for data_version in (1, 2):
        updates.append(each_plane.client.start_update(twin, data_version=data_version).id)
        each_plane.finish(twin)

    def stage(update: str, kind: StageKind) -> Stage:
        [found] = [stage for stage in each_plane.client.update(update).stages if stage.kind == kind]
        return found

    def points(update: str, kind: StageKind) -> list[MetricPoint]:
        return each_plane.client.metrics(update, stage(update, kind).id)

    first, second = (each_plane.client.update(update).branch_point for update in updates)
    assert first is not None
    assert second is not None
    whole, own, reused = (stage(update, StageKind.TRAIN_TRUNK) for update in (in_one, *updates))
    assert (whole.reused, own.reused, reused.reused) == (False, False, True)
    more = [
        {"step": step, "loss": 4.0, "learning_rate": 0.1, "grad_norm": 1, "tokens_per_second": 9}
        for step in (first - 1, first, first + 1)
    ]
    with each_plane.database.transaction() as session:
        metrics.record_points(session, whole.id, more)
    trained = points(in_one, StageKind.TRAIN_TRUNK)
    assert [point.step for point in trained] == [first - 1, first, first + 1, second]
    assert points(updates[1], StageKind.TRAIN_TRUNK) == trained[2:]
    # Only the stage's own range.
    assert [point.step for point in points(updates[0], StageKind.TRAIN_TRUNK)] == [first]
    assert points(updates[1], StageKind.TRAIN_BRANCH) == points(in_one, StageKind.TRAIN_BRANCH) != []


@ON_SQLITE
@pytest.mark.parametrize("paradigm", ["path_switching", "from_scratch", "continual"])
def test_a_line_never_trains_a_data_version_that_it_has_passed(
    each_plane: ControlPlane, model: str, name: str, paradigm: str
) -> None:
    """Neither in a new update nor by a retry, because it would replace a version with newer data."""
    line = f"{name}-{paradigm.replace('_', '-')}"
    each_plane.client.create_model(
        {"name": line, "dataset": model, "auto_update": False, "paradigm": {"name": paradigm}}
    )
    each_plane.fail_next(StageKind.EVALUATE, RunError("s", "stage_input_invalid", "no", False))
    failed = each_plane.client.start_update(line, data_version=1).id
    each_plane.finish(line)
    assert each_plane.client.update(failed).state == "failed"
    each_plane.client.start_update(line, data_version=2)
    each_plane.finish(line)
    older = each_plane.http.post(f"/models/{line}/updates", json={"data_version": 1})
    assert older.status_code == 422
    assert "already read data version 2, after data version 1" in older.json()["detail"]
    assert each_plane.http.post(f"/updates/{failed}/retry").status_code == 409
    assert each_plane.client.model_version(line, "served").data_version == 2
