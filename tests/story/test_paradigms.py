"""Every paradigm trains, evaluates, gates and serves a live model, and models share the stages they can."""

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
UNTRAINED_LOSS = math.log(320)  # of a vocabulary of 320 tokens


def stages_of(plane: ControlPlane, model: str, kinds: frozenset[StageKind]) -> list[Stage]:
    return [stage for update in plane.client.updates(model) for stage in update.stages if stage.kind in kinds]


def tokens(plane: ControlPlane, model: str) -> list[int]:
    return [row.tokens for row in plane.client.costs(model).versions]


def test_every_paradigm_releases_every_version_and_shares_stages(
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
            assert newest < UNTRAINED_LOSS - 0.5, name

    # The first model packs the data; all others reuse its packs.
    packs = {name: stages_of(plane, name, frozenset({StageKind.PACK})) for name in MODELS}
    assert {len(stages) for stages in packs.values()} == {1 + VERSIONS}
    assert sum(not stage.reused for stages in packs.values() for stage in stages) == VERSIONS
    # Two branch lengths share the trunk up to the earlier branch point.
    ends = {name: [v.branch_point.step for v in plane.client.model_versions(name)] for name in MODELS}
    assert all(a < b for a, b in zip(ends["path"][1:], ends["shorter"][1:], strict=True))
    [_, shared] = stages_of(plane, "shorter", frozenset({StageKind.TRAIN_TRUNK}))
    with plane.database.reading() as session:
        result = session.get_one(tables.Stage, shared.id).result
    assert result is not None
    assert result["resumed_from_step"] >= ends["path"][1]

    # The cost of N versions in steps of 256 tokens. From scratch: the sum of all final steps. Continual: the last final
    # step. Path switching: the last final step and the branches before it.
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

    # Paradigms that read old data again are better on the oldest slice than those that do not.
    def loss(name: str, slice_name: str) -> float:
        [row] = [
            row for row in plane.client.model_version(name, "latest").evaluations if row.slice == slice_name
        ]
        assert row.loss is not None
        return row.loss

    assert loss("scratch", "v1") < loss("reset", "v1")
    assert loss("replayed", "v1") < loss("path", "v1")


def test_an_update_past_the_lines_last_step_fails_with_the_reason(
    new_plane: NewPlane, workers: Workers
) -> None:
    """Starts a second update for a data version that the line has already read."""
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
