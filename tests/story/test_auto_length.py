"""Automatic branch length: a tenth of all steps at first, then chosen from the line's own measurements."""

import pytest

from service.core.states import UpdateState
from tests.story.conftest import NewPlane, Workers
from tests.support.story import DATASET, SPEC, push_and_release

pytestmark = pytest.mark.slow_on_postgres

AUTO = {"name": "path_switching", "decay": {"length": {"rule": "auto", "tolerance": 0.01, "max": 0.6}}}
VERSIONS = 4


def test_branch_length_is_chosen_from_the_lines_own_predictions(
    new_plane: NewPlane, workers: Workers
) -> None:
    plane = new_plane()
    executor, serving = workers(plane)
    plane.client.create_model(SPEC | {"paradigm": AUTO})
    for number in range(1, VERSIONS + 1):
        push_and_release(plane, number, executor, serving)
    updates = list(plane.client.updates("m"))
    notes = [update.notes["auto"] for update in updates]

    assert "no branch" in notes[0]["why"]
    for number, (update, note) in enumerate(zip(updates, notes, strict=True), 1):
        assert update.branch_point is not None
        assert update.final_step is not None
        assert update.notes["branch_steps"] == update.final_step - update.branch_point
        if number == 1:
            continue
        assert note["branches"] == number - 1
        lengths = [steps for steps, _ in note["predictions"]]
        assert update.notes["branch_steps"] in lengths
        losses = dict(map(tuple, note["predictions"]))
        chosen, best = losses[update.notes["branch_steps"]], min(losses.values())
        # The predictions in the notes are rounded.
        assert chosen <= best + 0.01 + 2e-5
        assert all(
            loss > best + 0.0099 for steps, loss in losses.items() if steps < update.notes["branch_steps"]
        )
    # The trunk passes the end of a branch during the next update, so the update after that one judges its prediction.
    assert notes[1]["last_prediction"] is None
    assert notes[2]["last_prediction"] is None
    judged = notes[3]["last_prediction"]
    assert judged["data_version"] == 2
    assert judged["predicted_drop"] == notes[1]["predicted_drop"]
    assert notes[3]["paired_steps"] >= updates[0].notes["branch_steps"]

    forecast = plane.client.costs("m").forecast
    assert forecast is not None
    assert 0 < forecast.tokens < forecast.from_scratch_tokens


def test_excluded_versions_do_not_enter_the_branch_length(new_plane: NewPlane, workers: Workers) -> None:
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
