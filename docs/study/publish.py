"""Reduce a finished study to what git keeps: `results.json`, `report.md` and the figures that README.md shows.

    pathswitch study deploy/study/growth.json FOLDER --out docs/study/digitalgov-8
    python docs/study/publish.py docs/study/digitalgov-8
    python docs/study/publish.py --check docs/study/*/      # exit status 1 if a report is stale

Training curves are most of `results.json`, so this script keeps at most `CURVE_POINTS` points of each. Run it again
after a change to the report's template: it also gives every line the name that today's code gives it.
"""

import shutil
import sys
from pathlib import Path

from api.cli.study.analysis import Analysis
from api.cli.study.figures import draw_figures
from api.cli.study.lines import study_plan
from api.cli.study.report import to_markdown
from api.cli.study.results import Curve, LineResult, Results, read_results, save_results

FIGURES = ("growth",)
CURVE_POINTS = 20


def publish(folder: Path) -> None:
    results = thinned(renamed(read_results(folder / "results.json")))
    save_results(folder, results)
    (folder / "report.md").write_text(report(results))
    (folder / "report.html").unlink(missing_ok=True)
    shutil.rmtree(folder / "figures", ignore_errors=True)
    (folder / "figures").mkdir()
    for name, svg in draw_figures(Analysis(results)).items():
        if name in FIGURES:
            (folder / "figures" / f"{name}.svg").write_text(svg)


def check(folder: Path) -> None:
    if (folder / "report.md").read_text() != report(renamed(read_results(folder / "results.json"))):
        raise SystemExit(f"{folder}/report.md is stale: run `python docs/study/publish.py {folder}`")


def report(results: Results) -> str:
    return to_markdown(Analysis(results), frozenset(FIGURES))


def renamed(results: Results) -> Results:
    """A line's name contains a digest of its specification, which changes whenever a specification gains a field."""
    stored = {(line.row, line.seed, line.peak_lr, line.only_newest): line for line in results.lines.values()}
    lines: dict[str, LineResult] = {}
    while True:
        # The plan grows as tuned peak rates become known, so repeat until it is complete.
        plan = study_plan(results.config, results.model_copy(update={"lines": lines}))
        keys = {line.name: (line.row.name, line.seed, line.peak_lr, line.only_newest) for line in plan}
        found = {name: stored[key] for name, key in keys.items() if key in stored}
        if found.keys() <= lines.keys():
            return results.model_copy(update={"lines": lines})
        lines |= found


def thinned(results: Results) -> Results:
    return results.model_copy(
        update={"lines": {name: _thin_line(line) for name, line in results.lines.items()}}
    )


def _thin_line(line: LineResult) -> LineResult:
    versions = tuple(
        version.model_copy(update={"curves": tuple(_thin(curve) for curve in version.curves)})
        for version in line.versions
    )
    return line.model_copy(update={"versions": versions})


def _thin(curve: Curve) -> Curve:
    """Every n-th point, counted from the last one, which is always kept."""
    stride = -(-len(curve.steps) // CURVE_POINTS)
    indices = range(len(curve.steps) - 1, -1, -stride)[::-1]
    return Curve(
        kind=curve.kind,
        steps=tuple(curve.steps[index] for index in indices),
        losses=tuple(curve.losses[index] for index in indices),
        rates=tuple(curve.rates[index] for index in indices),
    )


if __name__ == "__main__":
    action = check if "--check" in sys.argv else publish
    for argument in sys.argv[1:]:
        if argument != "--check":
            action(Path(argument))
