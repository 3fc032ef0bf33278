"""The lines of a study: which are trained, in which order, and which earlier results are kept."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from api.cli.errors import CliError
from api.cli.study.config import StudyConfig, load_config
from api.cli.study.lines import (
    StudyLine,
    missing_lines,
    num_lines,
    peak_of,
    study_lines,
    tuned,
    tuned_peaks,
    tuning_lines,
)
from api.cli.study.results import CommandRun, LineResult, Results, open_results, save_results
from tests.support.study import data_of, measuring, no_results, result_of, study_of, trained, with_lines

PEAKS = (0.001, 0.002, 0.004)
ROWS: tuple[dict[str, Any], ...] = (
    {"name": "path"},
    {"name": "other", "training": {"peak_lr": 0.003}},
    {"name": "shared", "paradigm": {"name": "merge"}, "peak_of": "path"},
)
STUDIES = Path(__file__).parents[4] / "deploy" / "study"


def study(**changes: Any) -> StudyConfig:
    tuning = {"rows": ["scratch", "path"], "peak_lrs": PEAKS, "seed": 0}
    return study_of(*ROWS, **({"seeds": [0, 1], "tuning": tuning} | changes))


def settings_of(lines: list[StudyLine]) -> list[tuple[str, int, float]]:
    return [(line.row.name, line.seed, line.peak_lr) for line in lines]


def missing(results: Results) -> list[StudyLine]:
    return list(missing_lines(results.config, results))


def best_at(peak_lr: float) -> dict[float, float]:
    return {peak: 50 + 1000 * abs(peak - peak_lr) for peak in PEAKS}


def tuned_row(results: Results, row: str, perplexities: Mapping[float, float | None]) -> Results:
    """Add tuning results of the row with these perplexities; None: the line diverges after version 1."""
    lines = {}
    for line in tuning_lines(results.config, results):
        if line.row.name == row and line.peak_lr in perplexities:
            made = measuring(lambda line, version, on: perplexities[line.peak_lr] or 1.0, 2)(line)
            if perplexities[line.peak_lr] is None:
                made = result_of(line, made.versions[0], error="diverged: the loss is nan at step 7")
            lines[line.name] = made
    return with_lines(results, lines)


# --- order ---


def test_tuning_comes_first_and_rows_wait_for_the_peak_rate_they_use() -> None:
    config = study()
    results = no_results(config)
    grid = [(row, 0, peak) for row in ("scratch", "path") for peak in PEAKS]
    assert settings_of(missing(results)) == [*grid, ("other", 0, 0.003), ("other", 1, 0.003)]

    results = tuned_row(results, "path", {0.001: 60, 0.002: 50})
    assert {row for row, _, _ in settings_of(missing(results))} == {
        "scratch",
        "path",
        "other",
    }  # one peak rate has no result yet

    results = tuned_row(results, "path", best_at(0.002))
    assert settings_of(missing(results)) == [
        *grid[:3],
        ("other", 0, 0.003),
        ("shared", 0, 0.002),
        ("path", 1, 0.002),
        ("other", 1, 0.003),
        ("shared", 1, 0.002),
    ]


def test_all_rows_train_with_the_first_seed_before_any_with_the_second() -> None:
    config = study_of(*ROWS[:2], seeds=[7, 3])
    assert [line.seed for line in study_lines(config, no_results(config))] == [7, 7, 7, 3, 3, 3]


def test_without_tuning_a_row_has_its_own_peak_rate_or_that_of_the_study() -> None:
    config = study_of(
        {"name": "path"},
        {"name": "other", "training": {"peak_lr": 0.02}},
        model={"training": {"peak_lr": 0.01}},
    )
    lines = study_lines(config, no_results(config))
    assert settings_of(lines) == [("scratch", 0, 0.01), ("path", 0, 0.01), ("other", 0, 0.02)]
    assert [line.spec["training"]["peak_lr"] for line in lines] == [0.01, 0.01, 0.02]


# --- the best peak ---


def test_the_best_peak_has_the_lowest_mean_perplexity_of_the_final_version() -> None:
    """Not the lowest on one slice, nor of an earlier version."""
    final = {0.001: (1.0, 99.0), 0.002: (45.0, 45.0), 0.004: (90.0, 10.0)}
    config = study()
    results = no_results(config)
    make_up = measuring(
        lambda line, version, on: final[line.peak_lr][on - 1] if version == 2 else 100 * line.peak_lr, 2
    )
    results = with_lines(results, {line.name: make_up(line) for line in tuning_lines(config, results)})
    for row in ("path", "shared", "scratch"):
        assert peak_of(config, config.row(row), results) == 0.002


def test_a_line_that_diverged_or_is_not_finite_is_never_the_best() -> None:
    config = study()
    path = config.row("path")
    results = tuned_row(no_results(config), "path", {0.001: 60, 0.002: None, 0.004: 61})
    assert peak_of(config, path, results) == 0.001

    infinite = measuring(lambda line, version, on: None if on == 1 else 1.0, 2)
    [best] = [line for line in tuning_lines(config, results) if line.row == path and line.peak_lr == 0.001]
    results = with_lines(results, {best.name: infinite(best)})
    assert peak_of(config, path, results) == 0.004

    results = tuned_row(results, "path", dict.fromkeys(PEAKS))
    assert peak_of(config, path, results) is None
    assert {line.row.name for line in study_lines(config, results)} == {"other"}


def widening(widen: int, optimum: float, **changes: Any) -> tuple[StudyConfig, Results]:
    """A finished study, in which the best peak rate is the one closest to ``optimum``."""
    tuning = {"rows": ["scratch", "path"], "peak_lrs": (0.004, 0.001, 0.002), "widen": widen} | changes
    config = study(tuning=tuning)
    make_up = measuring(lambda line, version, on: 50 + abs(math.log(line.peak_lr / optimum)), 2)
    return config, trained(no_results(config), make_up)


@pytest.mark.parametrize(
    ("optimum", "peaks", "best"),
    [
        (0.002, [0.001, 0.002, 0.004], 0.002),  # not at an end of the grid
        (0.001, [0.0005, 0.001, 0.002, 0.004], 0.001),
        (0.0004, [0.00025, 0.0005, 0.001, 0.002, 0.004], 0.0005),
        (0.0001, [0.000125, 0.00025, 0.0005, 0.001, 0.002, 0.004], 0.000125),  # at most three times
        (0.008, [0.001, 0.002, 0.004, 0.008, 0.016], 0.008),
    ],
)
def test_a_grid_is_extended_at_the_end_that_has_the_best_rate(
    optimum: float, peaks: list[float], best: float
) -> None:
    config, results = widening(3, optimum)
    for row in ("scratch", "path"):
        assert list(tuned(config, row, results)) == peaks
        assert peak_of(config, config.row(row), results) == best
    assert tuned_peaks(config, results) == tuple(peaks)


def test_each_row_widens_its_own_grid_and_waits_for_it() -> None:
    config, _ = widening(1, 0.002)
    results = tuned_row(no_results(config), "path", {0.001: 50, 0.002: 51, 0.004: 52})
    assert list(tuned(config, "path", results)) == [0.0005, 0.001, 0.002, 0.004]
    assert list(tuned(config, "scratch", results)) == [0.001, 0.002, 0.004]
    assert peak_of(config, config.row("path"), results) is None
    assert ("path", 0, 0.0005) in settings_of(missing(results))


def test_a_grid_stops_at_the_largest_valid_rate() -> None:
    config, results = widening(16, 1.0, peak_lrs=(0.125, 0.25))
    assert list(tuned(config, "path", results)) == [0.125, 0.25, 0.5, 1.0]


def test_a_grid_of_diverged_lines_is_extended_downwards() -> None:
    config, _ = widening(1, 0.002)
    results = tuned_row(no_results(config), "path", dict.fromkeys(PEAKS))
    assert list(tuned(config, "path", results)) == [0.0005, *PEAKS]


# --- trained once ---


def test_tuning_lines_are_reused_except_from_scratch_ones_which_train_only_the_newest_version() -> None:
    config = study()
    results = no_results(config)
    for row in ("scratch", "path"):
        results = tuned_row(results, row, best_at(0.004))
    lines = {(line.row.name, line.seed): line for line in study_lines(config, results)}
    grid = {(line.row.name, line.peak_lr): line for line in tuning_lines(config, results)}
    assert grid["path", 0.004] == lines["path", 0]
    assert grid["path", 0.004].name in results.lines
    assert grid["scratch", 0.004].only_newest
    assert not lines["scratch", 0].only_newest
    assert grid["scratch", 0.004].name != lines["scratch", 0].name
    assert not any(line.only_newest for line in lines.values())


@pytest.mark.parametrize(
    "config",
    [
        study(),
        study_of(*ROWS[:2], seeds=[0, 1]),
        study(seeds=[1, 2]),  # the tuning seed is not one of them
        study(tuning={"rows": ["path"], "peak_lrs": PEAKS, "seed": 1}),
        load_config(STUDIES / "smoke.json"),
        load_config(STUDIES / "paradigms.json"),
    ],
)
def test_the_announced_number_of_lines_is_trained_and_none_twice(config: StudyConfig) -> None:
    make_up = measuring(lambda line, version, on: 40 + abs(line.peak_lr - 0.003), 1)
    asked: list[str] = []

    def noted(line: StudyLine) -> LineResult:
        asked.append(line.name)
        return make_up(line)

    nothing = no_results(config, 1)
    results = trained(nothing, noted)
    assert len(asked) == len(set(asked)) == len(results.lines) == num_lines(config, results)
    if config.tuning is None or not config.tuning.widen:
        assert num_lines(config, nothing) == len(asked)
    assert missing(results) == []
    own = {(line.row, line.seed) for line in results.lines.values() if not line.only_newest}
    assert {(row.name, seed) for row in config.rows for seed in config.seeds} <= own


# --- results of earlier runs ---


def test_diverged_lines_are_not_retried_and_other_failures_are() -> None:
    config = study_of({"name": "path"})
    results = no_results(config)
    scratch, path = missing(results)
    diverged = result_of(path, error="diverged: the loss is nan at step 7")
    assert missing(with_lines(results, {path.name: diverged})) == [scratch]
    for error in ("worker_lost: the process is gone", "cancelled"):
        assert missing(with_lines(results, {path.name: result_of(path, error=error)})) == [scratch, path]


def test_a_changed_row_is_trained_again_and_other_rows_keep_their_results() -> None:
    make_up = measuring(lambda line, version, on: 50.0, 2)
    before = trained(no_results(study()), make_up)
    changed = {"name": "shared", "paradigm": {"name": "merge", "k": 3}, "peak_of": "path"}
    config = study_of(*ROWS[:2], changed, seeds=[0, 1], tuning=study().tuning)
    after = before.model_copy(update={"config": config})
    assert [(line.row.name, line.seed) for line in missing(after)] == [("shared", 0), ("shared", 1)]
    assert missing(before) == []


def test_results_survive_a_round_trip_and_a_changed_configuration(tmp_path: Path) -> None:
    data = data_of(["a"], ["b"], slices=[["c"], ["d"]])
    fresh = open_results(tmp_path, study(), data)
    assert (fresh.labels, fresh.lines, fresh.parts) == (("v1", "v2"), {}, ())
    results = trained(fresh, measuring(lambda line, version, on: None if on == 2 else 1 / 3, 2))
    part = CommandRun(command="pathswitch study", began="then", ended="later", lines=3, machine="2 CPU cores")
    results = results.model_copy(update={"parts": (part,)})
    save_results(tmp_path / "deep" / "er", results)
    assert open_results(tmp_path / "deep" / "er", study(), data) == results

    assert results.lines
    other = study(seeds=[0])
    again = open_results(tmp_path / "deep" / "er", other, data)
    assert again == results.model_copy(update={"config": other})


def test_results_of_other_data_are_refused(tmp_path: Path) -> None:
    data = data_of(["a"], ["b"], slices=[["c"], ["d"]])
    save_results(tmp_path, open_results(tmp_path, study(), data))
    others = [
        data_of(["a"], ["B"], slices=[["c"], ["d"]]),
        data_of(["a"], ["b"], slices=[["c"], ["D"]]),
        data_of(["a"], ["b"]),
        data_of(["a"], slices=[["c"]]),
    ]
    for other in others:
        with pytest.raises(CliError, match="has results for different data"):
            open_results(tmp_path, study(), other)


def test_an_invalid_results_file_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"lines"')
    with pytest.raises(CliError, match="is not a valid results file"):
        open_results(tmp_path, study(), data_of(["a"]))


def test_a_row_waits_for_a_peak_rate_whose_line_failed() -> None:
    """A dead worker says nothing about the rate.

    The next run retries it, and rows must not use another rate meanwhile.
    """
    results = tuned_row(no_results(study()), "path", best_at(0.002))
    [line] = [
        one for one in tuning_lines(results.config, results) if (one.row.name, one.peak_lr) == ("path", 0.002)
    ]
    lost = with_lines(
        results, {line.name: results.lines[line.name].model_copy(update={"error": "worker_lost: gone"})}
    )
    row = results.config.row("path")
    assert peak_of(results.config, row, results) == 0.002
    assert peak_of(results.config, row, lost) is None
    assert line.name in {one.name for one in missing(lost)}
