"""A trunk that several rows share, assembled from the parts that each of them trained."""

from api.cli.study.analysis import Analysis
from api.cli.study.lines import missing_lines
from api.cli.study.results import LineResult
from service.core.stage_specs import StageKind
from tests.support.study import FIXED, measuring, no_results, result_of, study_of, trained, with_lines

PATH = {"name": "path", "paradigm": FIXED}
CONTINUAL = {"name": "continual", "paradigm": {"name": "continual"}}


def test_a_shared_trunk_is_complete_and_has_no_part_twice() -> None:
    """The row itself trained only the last part.

    Another row, which shares the trunk, trained the part before.
    """
    config = study_of(PATH, {"name": "merge", "paradigm": {"name": "merge"}}, CONTINUAL)
    results = no_results(config)
    lines: dict[str, LineResult] = {}
    for line in missing_lines(config, results):
        made = measuring(lambda line, version, on: 100.0, 2)(line)
        if line.row.name == "path":
            first, second = made.versions
            made = result_of(line, first.model_copy(update={"curves": ()}), second)
        lines[line.name] = made
    analysis = Analysis(with_lines(results, lines))
    for row, last in (("path", 140), ("merge", 200)):
        trunk = analysis.trunk(row)
        assert [step for curve in trunk for step in curve.steps] == list(range(10, last + 1, 10))
        assert {curve.kind for curve in trunk} == {StageKind.TRAIN_TRUNK}
        for curve in trunk:
            assert len(curve.steps) == len(curve.losses) == len(curve.rates)
            assert curve.losses == tuple(6 - step / 1000 for step in curve.steps)
    assert analysis.trunk("continual") == analysis.trunk("scratch") == []


def test_lines_with_another_seed_peak_rate_or_training_have_another_trunk() -> None:
    """The row's own line is the only one without curves."""
    config = study_of(
        PATH,
        {
            "name": "merge",
            "paradigm": {"name": "merge"},
            "training": {"weight_decay": 0.2},
            "peak_of": "path",
        },
        seeds=[0, 1],
        tuning={"rows": ["path"], "peak_lrs": [0.001, 0.002]},
    )
    results = trained(no_results(config), measuring(lambda line, version, on: 100.0, 2))
    assert Analysis(results).trunk("path")
    bare = {
        name: line.model_copy(
            update={"versions": tuple(v.model_copy(update={"curves": ()}) for v in line.versions)}
        )
        for name, line in results.lines.items()
        if line == Analysis(results).line("path")
    }
    assert len(bare) == 1
    assert Analysis(with_lines(results, bare)).trunk("path") == []


def test_results_of_a_row_before_it_changed_are_in_no_trunk() -> None:
    """They are still in the file, and had the same seed, peak rate and training."""
    config = study_of(PATH, {"name": "other", "paradigm": FIXED | {"decay": {"floor": 0.1}}})
    results = trained(no_results(config), measuring(lambda line, version, on: 100.0, 2))
    [path] = [name for name, line in results.lines.items() if line.row == "path"]
    bare = tuple(version.model_copy(update={"curves": ()}) for version in results.lines[path].versions)
    results = with_lines(results, {path: results.lines[path].model_copy(update={"versions": bare})})
    assert Analysis(results).trunk("path")
    changed = study_of(PATH, {"name": "other", "paradigm": {"name": "continual"}})
    assert Analysis(results.model_copy(update={"config": changed})).trunk("path") == []
