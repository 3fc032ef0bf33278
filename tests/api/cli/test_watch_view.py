"""The view of a running update, on a terminal and as lines."""

from datetime import timedelta

import pytest
from rich.console import Console

from api.cli.watch import LineScreen
from api.cli.watch_view import BRANCH_STYLE, TRUNK_STYLE, line, paths, view
from tests.api.cli.documents import PROGRESS, START, points, rendered, stage_document, update_document

NOW = START + timedelta(seconds=65)


def test_a_running_update_shows_stages_progress_and_both_charts() -> None:
    update = update_document(
        "running",
        stage_document("pack-2", "pack", "succeeded", reused=True),
        stage_document("trunk", "train_trunk", "running", progress=PROGRESS, attempt=2),
        stage_document("branch", "train_branch", "pending"),
    )
    text = rendered(view(update, {"stg_trunk": points(1, 2, 3)}, NOW, 120))
    for expected in ("news · data version 2", "1 min 05 s", "reused", "45/90", "5.2500", "2.00e-3", "12.3 k"):
        assert expected in text
    assert "learning rate" in text
    assert "⠉" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_failed_stage_shows_its_error() -> None:
    error = {"code": "diverged", "detail": "the loss is not finite at step 7", "stage": "trunk"}
    failed = stage_document("trunk", "train_trunk", "failed", error=error)
    text = rendered(view(update_document("failed", failed, error=error), {}, NOW, 120))
    assert text.count("trunk: diverged: the loss is not finite at step 7") == 1


def test_the_curve_of_a_branch_starts_at_the_end_of_its_trunk() -> None:
    update = update_document(
        "running",
        stage_document("trunk", "train_trunk", "succeeded"),
        stage_document("branch", "train_branch", "running"),
    )
    found = paths(update, {"stg_trunk": points(1, 2), "stg_branch": points(3)})
    assert [(style, [point.step for point in line]) for style, line in found] == [
        (TRUNK_STYLE, [1, 2]),
        (BRANCH_STYLE, [2, 3]),
    ]


def test_a_line_shows_everything_known_about_a_stage() -> None:
    running = stage_document("trunk", "train_trunk", "running", progress=PROGRESS, attempt=2)
    assert line(update_document("running", running).stages[0], NOW) == (
        "trunk · running · attempt 2 · step 45/90 · loss 5.2500 · lr 2.00e-3 · 12.3 k tokens/s"
        " · 1 min 15 s left"
    )
    done = update_document("running", stage_document("pack-2", "pack", "succeeded")).stages[0]
    assert line(done, NOW) == "pack-2 · succeeded · 20 s"


def test_lines_are_printed_only_on_changes(capsys: pytest.CaptureFixture[str]) -> None:
    screen = LineScreen(Console(width=200))

    def shown(state: str, step: int, update_state: str = "running") -> list[str]:
        progress = PROGRESS | {"step": step}
        stages = (
            stage_document("trunk", "train_trunk", state, progress=progress),
            stage_document("branch", "train_branch", "pending"),
        )
        screen.show(update_document(update_state, *stages), {})
        return capsys.readouterr().out.splitlines()

    assert len(shown("running", 1)) == 2, "the stage, and the update"
    assert shown("running", 2) == [], "less than a tenth further"
    assert len(shown("running", 10)) == 1
    assert len(shown("succeeded", 90)) == 1
    assert shown("succeeded", 90) == []
    assert len(shown("succeeded", 90, "succeeded")) == 1
