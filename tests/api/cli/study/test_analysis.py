"""The analysis of a study, on numbers that a reader can check."""

import math
from collections.abc import Mapping
from typing import Any

import pytest

from api.cli.study.analysis import Analysis, Spread
from api.cli.study.config import StudyConfig
from api.cli.study.lines import StudyLine
from api.cli.study.results import Results
from tests.support.study import (
    FIXED,
    Quality,
    measuring,
    no_results,
    study_of,
    trained,
    with_lines,
)

COSINE = {"name": "cosine", "paradigm": {"name": "from_scratch"}}
PATH = {"name": "path", "paradigm": FIXED}
MERGE = {"name": "merge", "paradigm": {"name": "merge"}}
CONTINUAL = {"name": "continual", "paradigm": {"name": "continual"}}


def two_baselines(*rows: dict[str, Any], **changes: Any) -> StudyConfig:
    return study_of(COSINE, *rows, baselines=["scratch", "cosine"], **changes)


def analysed(config: StudyConfig, versions: int, quality: Quality) -> Analysis:
    return Analysis(trained(no_results(config, versions), measuring(quality, versions)))


def by_row(perplexities: Mapping[str, float]) -> Quality:
    """The same perplexity on every slice of every version."""
    return lambda line, version, on: perplexities[line.row.name]


def summary(analysis: Analysis, row: str) -> Any:
    [found] = [summary for summary in analysis.rows if summary.row.name == row]
    return found


def mean_of(spread: Spread | None) -> float:
    assert spread is not None
    return spread.mean


# --- quality ---


def test_each_version_has_its_own_better_baseline_by_the_mean_over_seeds() -> None:
    """With the first seed alone, the other baseline would be better."""
    at = {"scratch": {1: (90, 130), 2: (100, 100)}, "cosine": {1: (100, 100), 2: (80, 110)}}
    analysis = analysed(
        two_baselines(seeds=[0, 1]), 2, lambda line, version, on: at[line.row.name][version][line.seed]
    )
    assert analysis.baselines == ("cosine", "cosine")
    at["cosine"][2] = (80, 121)
    analysis = analysed(
        two_baselines(seeds=[0, 1]), 2, lambda line, version, on: at[line.row.name][version][line.seed]
    )
    assert analysis.baselines == ("cosine", "scratch")


def test_a_gap_compares_with_the_better_baseline_with_the_same_seed() -> None:
    """Seeds differ far more than rows, and the gap must not show it."""
    base = {0: 100.0, 1: 200.0, 2: 400.0}
    factors = {
        "path": (1.1, 1.1, 1.1),
        "continual": (1.0, 1.1, 1.2),
        "scratch": (1, 1, 1),
        "cosine": (2, 2, 2),
    }
    analysis = analysed(
        two_baselines(PATH, CONTINUAL, seeds=[0, 1, 2]),
        1,
        lambda line, version, on: base[line.seed] * factors[line.row.name][line.seed],
    )
    path, continual = summary(analysis, "path").final, summary(analysis, "continual").final
    assert (path.gap.mean, path.gap.sd) == (pytest.approx(0.1), pytest.approx(0))
    assert (continual.gap.mean, continual.gap.sd) == (pytest.approx(0.1), pytest.approx(0.1))  # over n - 1
    assert path.perplexity.mean == pytest.approx(1.1 * 700 / 3)
    assert path.perplexity.sd == pytest.approx(1.1 * math.sqrt((400**2 + 100**2 + 500**2) / 9 / 2))
    assert summary(analysis, "scratch").final.gap == Spread(0, 0)
    assert summary(analysis, "path").seeds == (0, 1, 2)


def test_a_single_seed_has_no_standard_deviation() -> None:
    analysis = analysed(study_of(PATH), 1, by_row({"scratch": 100, "path": 90}))
    assert summary(analysis, "path").final.gap == Spread(pytest.approx(-0.1), None)


def test_there_are_gaps_of_the_mean_over_slices_and_of_each_slice() -> None:
    at = {"scratch": (100.0, 50.0), "path": (110.0, 40.0)}
    analysis = analysed(study_of(PATH), 2, lambda line, version, on: at[line.row.name][on - 1])
    final = summary(analysis, "path").final
    assert mean_of(final.gap) == pytest.approx(0)
    assert {label: mean_of(gap) for label, gap in final.slice_gaps.items()} == {
        "v1": pytest.approx(0.1),
        "v2": pytest.approx(-0.2),
    }
    assert final.worst_slice_gap == pytest.approx(0.1)
    assert mean_of(final.newest_gap) == pytest.approx(-0.2)
    first = summary(analysis, "path").versions[0]
    assert list(first.slice_gaps) == list(first.slice_perplexities) == ["v1"]


def test_backward_transfer_is_positive_if_old_text_is_forgotten() -> None:
    """The loss of one row rises by 0.3 on v1 and 0.1 on v2 since each was new.

    The other row only improves.
    """

    def quality(line: StudyLine, version: int, on: int) -> float:
        if line.row.name == "path":
            return math.exp(4 - 0.1 * (version - on))
        return math.exp(4 + (0.3 if (version, on) == (3, 1) else 0.1 * (version - on)))

    analysis = analysed(study_of(PATH), 3, quality)
    forgets, gains = summary(analysis, "scratch").versions, summary(analysis, "path").versions
    assert forgets[0].backward_transfer is None
    assert [mean_of(version.backward_transfer) for version in forgets[1:]] == pytest.approx([0.1, 0.2])
    assert [mean_of(version.backward_transfer) for version in gains[1:]] == pytest.approx([-0.1, -0.15])


# --- cost ---


def test_the_cost_ratio_covers_all_versions_so_far() -> None:
    """Hundreds of steps: 1, 2, 3, 4 from scratch; 1, 1.6, 1.6, 1.6 path switching; 1, 1, 1, 1 continual."""
    analysis = analysed(study_of(PATH, CONTINUAL), 4, by_row({"scratch": 100, "path": 100, "continual": 100}))
    ratios = {row.row.name: [version.cost_ratio for version in row.versions] for row in analysis.rows}
    assert ratios["scratch"] == [1, 1, 1, 1]
    assert ratios["path"] == pytest.approx([1, 2.6 / 3, 4.2 / 6, 5.8 / 10])
    assert ratios["continual"] == pytest.approx([1, 2 / 3, 3 / 6, 4 / 10])


@pytest.mark.parametrize(("fraction", "versions", "ratio"), [(0.6, 4, 0.58), (0.2, 4, 0.46), (0.6, 1, 1.0)])
def test_the_closed_form_of_path_switching_equals_the_actual_cost(
    fraction: float, versions: int, ratio: float
) -> None:
    decay = {"length": {"rule": "fixed", "fraction": fraction}}
    path = {"name": "path", "paradigm": {"name": "path_switching", "decay": decay}}
    analysis = analysed(study_of(path), versions, by_row({"scratch": 100, "path": 100}))
    assert analysis.closed_form_ratio("path") == pytest.approx(ratio)
    assert summary(analysis, "path").final.cost_ratio == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("decay", "trunk", "steps"),
    [
        ({"replay_fraction": 0.5, "replay_budget": "kept"}, 0.0, 200 + 60),
        ({"replay_fraction": 0.5, "replay_budget": "grown"}, 0.0, 200 + 60 + 30),
        ({"replay_fraction": 0.0}, 0.2, 225 + 60),
        ({"replay_fraction": 0.5, "replay_budget": "grown"}, 0.2, 225 + 60 + 22.5),
        ({"replay_fraction": 0.2, "replay_budget": "grown"}, 0.2, 225 + 60),
    ],
)
def test_the_closed_form_includes_replay(decay: dict[str, Any], trunk: float, steps: int) -> None:
    """From scratch it is 300. The second version's 100 steps become 125 if a fifth of them are replay."""
    row = {
        "name": "path",
        "paradigm": {"name": "path_switching", "decay": FIXED["decay"] | decay},
        "training": {"replay_fraction": trunk},
    }
    analysis = analysed(study_of(row), 2, lambda line, version, on: 100.0)
    assert analysis.closed_form_ratio("path") == pytest.approx(steps / 300)


def test_other_paradigms_have_no_closed_form() -> None:
    analysis = analysed(study_of(MERGE), 2, lambda line, version, on: 100.0)
    assert analysis.closed_form_ratio("merge") is analysis.closed_form_ratio("scratch") is None


# --- targets ---


def reached(analysis: Analysis) -> list[tuple[tuple[str, ...], str | None]]:
    return [(target.reached, target.nearest) for target in analysis.targets()]


def test_rows_that_are_good_and_cheap_enough_reach_targets() -> None:
    """Path switching costs 58 %, too much for the second target.

    Continual training costs 40 % but is worse.
    """
    analysis = analysed(study_of(PATH, CONTINUAL), 4, by_row({"scratch": 100, "path": 99, "continual": 101}))
    assert reached(analysis) == [(("path",), None), ((), "continual (+1.0%)"), (("path",), None)]
    assert analysis.all_targets() == ()

    analysis = analysed(
        study_of(PATH, CONTINUAL), 4, by_row({"scratch": 100, "path": 100, "continual": 99.5})
    )
    assert reached(analysis) == [
        (("path", "continual"), None),
        (("continual",), None),
        (("continual",), None),  # an equal perplexity is not better
    ]
    assert analysis.all_targets() == ("continual",)


def test_one_worse_slice_or_version_misses_a_target() -> None:
    def quality(line: StudyLine, version: int, on: int) -> float:
        if line.row.name == "scratch":
            return 100
        worse = {"path": (4, 1), "continual": (3, 3)}[line.row.name]
        return 103 if (version, on) == worse else 98

    analysis = analysed(study_of(PATH, CONTINUAL), 4, quality)
    assert [found for found, _ in reached(analysis)] == [("continual",), ("continual",), ("path",)]
    assert analysis.all_targets() == ()


# --- missing and non-finite results ---


def test_a_non_finite_value_is_none_and_affects_no_other() -> None:
    """One row is not finite on the first slice of the final version, with one seed."""

    def quality(line: StudyLine, version: int, on: int) -> float | None:
        return None if (line.row.name, line.seed, version, on) == ("path", 1, 2, 1) else 100.0

    analysis = analysed(study_of(PATH, CONTINUAL, seeds=[0, 1]), 2, quality)
    first, final = summary(analysis, "path").versions
    assert first.gap == Spread(0, 0)
    assert (final.perplexity, final.gap, final.slice_gaps["v1"], final.slice_perplexities["v1"]) == (
        None,
    ) * 4
    assert final.slice_gaps["v2"] == Spread(0, 0)
    assert final.worst_slice_gap == math.inf
    assert summary(analysis, "continual").final.gap == Spread(0, 0)
    assert analysis.targets()[0].nearest is None


def test_a_baseline_that_is_not_finite_is_never_the_better_one() -> None:
    def quality(line: StudyLine, version: int, on: int) -> float | None:
        return None if line.row.name == "scratch" and version == 2 else 100.0

    assert analysed(two_baselines(), 2, quality).baselines[1] == "cosine"
    alone = analysed(study_of(PATH), 2, quality)
    assert alone.baselines == ("scratch", None)
    assert [version.gap for version in summary(alone, "path").versions] == [Spread(0, None), None]
    assert summary(alone, "path").final.perplexity == Spread(100, None)


def part_of(config: StudyConfig, versions: int, quality: Quality, keep: Any) -> Results:
    whole = trained(no_results(config, versions), measuring(quality, versions))
    kept = {name: line for name, line in whole.lines.items() if keep(line)}
    return whole.model_copy(update={"lines": kept})


def test_rows_and_seeds_that_are_not_trained_yet_are_left_out() -> None:
    base = {0: 100.0, 1: 300.0}
    results = part_of(
        study_of(PATH, CONTINUAL, seeds=[0, 1]),
        2,
        lambda line, version, on: base[line.seed] * (1.5 if line.row.name == "path" else 1),
        lambda line: (line.row, line.seed) not in {("scratch", 1), ("continual", 0), ("continual", 1)},
    )
    analysis = Analysis(results)
    assert [(row.row.name, row.seeds) for row in analysis.rows] == [("scratch", (0,)), ("path", (0, 1))]
    assert summary(analysis, "path").final.gap == Spread(
        pytest.approx(0.5), None
    )  # of the only seed that both have
    assert mean_of(summary(analysis, "path").final.perplexity) == 300
    assert analysis.line("continual") is None
    assert analysis.closed_form_ratio("continual") is None
    assert analysis.trunk("continual") == []


def test_without_a_baseline_there_are_costs_and_no_gaps() -> None:
    quality = by_row({"scratch": 100, "path": 100})
    analysis = Analysis(part_of(study_of(PATH), 4, quality, lambda line: line.row == "path"))
    assert analysis.baselines == (None,) * 4
    [path] = analysis.rows
    assert path.final.cost_ratio == pytest.approx(0.58)
    assert (path.final.gap, path.final.perplexity) == (None, Spread(100, None))
    assert reached(analysis) == [((), None)] * 3


def test_lines_that_failed_are_left_out() -> None:
    config = study_of(PATH, seeds=[0, 1])
    results = trained(no_results(config), measuring(by_row({"scratch": 100, "path": 100}), 2))
    half = {
        name: line.model_copy(update={"versions": line.versions[:1], "error": "diverged: nan at step 7"})
        for name, line in results.lines.items()
        if (line.row, line.seed) == ("path", 0)
    }
    assert len(half) == 1
    assert summary(Analysis(with_lines(results, half)), "path").seeds == (1,)


def test_without_results_there_are_no_rows() -> None:
    analysis = Analysis(no_results(study_of(PATH)))
    assert (analysis.rows, analysis.baselines) == ((), (None, None))
    assert reached(analysis) == [((), None)] * 3
