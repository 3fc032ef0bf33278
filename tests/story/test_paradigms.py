"""Every paradigm as the paradigm of a live model: trained, measured, judged, served, and shared where it can be."""

import math
from typing import Any

import pytest

from api.schemas.updates import Stage
from service.core.paradigms import PARADIGMS
from service.core.stage_specs import StageKind
from service.core.states import UpdateState
from service.store import tables
from tests.story.conftest import NewPlane, Workers
from tests.support.control_plane import ControlPlane
from tests.support.story import DATASET, DOCUMENTS, SPEC, released
from tests.support.training import texts_of

pytestmark = pytest.mark.slow_on_postgres

BRANCH = {"decay": {"length": {"rule": "fixed", "fraction": 0.4}}}
SHORTER = {"decay": {"length": {"rule": "fixed", "fraction": 0.2}}}
REPLAYED = {
    "decay": {"length": {"rule": "fixed", "fraction": 0.4}, "replay_fraction": 0.5, "replay_budget": "grown"}
}
MODELS: dict[str, dict[str, Any]] = {
    "path": {"paradigm": {"name": "path_switching", **BRANCH}},
    "shorter": {"paradigm": {"name": "path_switching", **SHORTER}},
    "replayed": {
        "paradigm": {"name": "path_switching", **REPLAYED},
        "training": {"replay_fraction": 0.25, "replay_mixture": "recency"},
    },
    "scratch": {"paradigm": {"name": "from_scratch", "schedule": "wsd"}},
    "reset": {"paradigm": {"name": "continual", "restart": "reset", "optimizer_state": "reset"}},
    "wsd-s": {"paradigm": {"name": "wsd_s", **REPLAYED}},
    "merge": {"paradigm": {"name": "merge", "k": 3, "span": BRANCH["decay"]["length"]}},
    "muon": {"training": {"optimizer": "muon"}},
}
VERSIONS = 2
UNTRAINED = math.log(320)  # of as many tokens


def stages(plane: ControlPlane, model: str, kinds: frozenset[StageKind]) -> list[Stage]:
    return [stage for update in plane.client.updates(model) for stage in update.stages if stage.kind in kinds]


def tokens(plane: ControlPlane, model: str) -> list[int]:
    return [row.tokens for row in plane.client.costs(model).versions]


def test_every_paradigm_makes_every_version_and_shares_what_it_can(
    new_plane: NewPlane, workers: Workers
) -> None:
    plane = new_plane()
    executor, serving = workers(plane)
    for name, changes in MODELS.items():
        training = {"training": SPEC["training"] | {"replay_fraction": 0.0} | changes.get("training", {})}
        plane.client.create_model(SPEC | {"name": name} | changes | training)
    assert {change["paradigm"]["name"] for change in MODELS.values() if "paradigm" in change} == set(
        PARADIGMS
    )
    for number in range(1, VERSIONS + 1):
        plane.push(DATASET, *texts_of(number, DOCUMENTS)).raise_for_status()
        for name in MODELS:
            version = released(plane, executor, serving, name)
            assert (version.number, version.data_version) == (number, number)
            assert {row.slice for row in version.evaluations} == {f"v{n}" for n in range(1, number + 1)}
            [newest] = [row.loss for row in version.evaluations if row.slice == f"v{number}"]
            assert newest is not None
            assert newest < UNTRAINED - 0.5, name

    # Whoever came first packed; all others read its packs.
    packs = {name: stages(plane, name, frozenset({StageKind.PACK})) for name in MODELS}
    assert {len(found) for found in packs.values()} == {1 + VERSIONS}
    assert sum(not stage.reused for found in packs.values() for stage in found) == VERSIONS
    # Two branch lengths share the trunk up to the earlier branch point.
    ends = {name: [v.branch_point.step for v in plane.client.model_versions(name)] for name in MODELS}
    assert all(a < b for a, b in zip(ends["path"][1:], ends["shorter"][1:], strict=True))
    [_, shared] = stages(plane, "shorter", frozenset({StageKind.TRAIN_TRUNK}))
    with plane.database.reading() as session:
        result = session.get_one(tables.Stage, shared.id).result
    assert result is not None
    assert result["resumed_from_step"] >= ends["path"][1]

    # N versions cost, in steps of 256 tokens: the sum of all ends, every end once, and what is trained again.
    steps = {name: [count // 256 for count in tokens(plane, name)] for name in MODELS}
    total = ends["merge"]
    assert steps["scratch"] == total
    for name in ("reset", "merge"):
        assert sum(steps[name]) == total[-1]
    for name in ("path", "shorter"):
        versions = list(plane.client.model_versions(name))
        branches = [version.final_step - version.branch_point.step for version in versions]
        assert sum(steps[name]) == total[-1] + sum(branches[:-1])
    assert plane.client.costs("scratch").ratio_to_from_scratch == pytest.approx(1.0)
    assert plane.client.costs("reset").ratio_to_from_scratch == pytest.approx(total[-1] / sum(total))
    assert sum(steps["replayed"]) > sum(steps["path"])

    # Whoever reads all old data anew is best on the oldest slice; whoever never does, worst.
    def loss(name: str, on: str) -> float:
        [row] = [row for row in plane.client.model_version(name, "latest").evaluations if row.slice == on]
        assert row.loss is not None
        return row.loss

    assert loss("scratch", "v1") < loss("reset", "v1")
    assert loss("replayed", "v1") < loss("path", "v1")


def test_what_a_line_cannot_go_on_from_fails_its_update_with_the_reason(
    new_plane: NewPlane, workers: Workers
) -> None:
    """A second update for a data version that the line has read."""
    plane = new_plane()
    executor, serving = workers(plane)
    plane.client.create_model(SPEC | {"paradigm": {"name": "continual"}})
    plane.push(DATASET, *texts_of(1, DOCUMENTS)).raise_for_status()
    released(plane, executor, serving, "m")
    plane.client.start_update("m")
    plane.finish("m", executor, serving)
    again = list(plane.client.updates("m"))[-1]
    assert again.state == UpdateState.FAILED
    assert again.error is not None
    assert "past the last step" in again.error.detail
