"""A line whose branches choose their length: a tenth of all steps at first, then by what it has measured of itself."""

import pytest

from service.core.states import UpdateState
from tests.story.conftest import NewPlane, Workers
from tests.support.story import DATASET, SPEC, push_and_release

pytestmark = pytest.mark.slow_on_postgres

AUTO = {"name": "path_switching", "decay": {"length": {"rule": "auto", "tolerance": 0.01, "max": 0.6}}}
VERSIONS = 4


def test_branches_learn_their_length_from_the_line_itself(new_plane: NewPlane, workers: Workers) -> None:
    plane = new_plane()
    executor, serving = workers(plane)
    plane.client.create_model(SPEC | {"paradigm": AUTO})
    for number in range(1, VERSIONS + 1):
        push_and_release(plane, number, executor, serving)
    updates = list(plane.client.updates("m"))
    notes = [update.notes["auto"] for update in updates]

    assert "no branch" in notes[0]["why"]
    for number, (update, said) in enumerate(zip(updates, notes, strict=True), 1):
        assert update.branch_point is not None
        assert update.final_step is not None
        assert update.notes["branch_steps"] == update.final_step - update.branch_point
        if number == 1:
            continue
        assert said["branches"] == number - 1
        lengths = [steps for steps, _ in said["predictions"]]
        assert update.notes["branch_steps"] in lengths
        losses = dict(map(tuple, said["predictions"]))
        chosen, best = losses[update.notes["branch_steps"]], min(losses.values())
        # The notes are rounded.
        assert chosen <= best + 0.01 + 2e-5
        assert all(
            loss > best + 0.0099 for steps, loss in losses.items() if steps < update.notes["branch_steps"]
        )
    # The trunk overtakes a branch with the next version, so its prediction is judged at the one after.
    assert notes[1]["last_prediction"] is None
    assert notes[2]["last_prediction"] is None
    judged = notes[3]["last_prediction"]
    assert judged["data_version"] == 2
    assert judged["predicted_drop"] == notes[1]["predicted_drop"]
    assert notes[3]["paired_steps"] >= updates[0].notes["branch_steps"]

    forecast = plane.client.costs("m").forecast
    assert forecast is not None
    assert 0 < forecast.tokens < forecast.from_scratch_tokens


def test_what_was_excluded_teaches_a_line_nothing(new_plane: NewPlane, workers: Workers) -> None:
    plane = new_plane()
    executor, serving = workers(plane)
    plane.client.create_model(SPEC | {"paradigm": AUTO})
    for number in (1, 2):
        push_and_release(plane, number, executor, serving)
    plane.client.exclude_version(DATASET, 2, "a mirror")
    push_and_release(plane, 3, executor, serving)
    last = list(plane.client.updates("m"))[-1]
    assert last.state == UpdateState.SUCCEEDED
    assert last.notes["auto"]["branches"] == 1
