"""Plans the lines of a study: each tuned row at each peak rate of its grid, then each row with each seed."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from api.cli.study.config import StudyConfig, StudyRow, Tuning, digest
from api.cli.study.results import LineResult, Measured, Results
from service.core.specs import MAX_PEAK_LR


@dataclass(frozen=True)
class StudyLine:
    """A model line to train.

    ``only_newest``: train only its final version, which is enough to tune a from-scratch row.
    """

    row: StudyRow
    seed: int
    peak_lr: float
    only_newest: bool
    spec: Mapping[str, Any]  # with placeholders for the names of the model and the dataset

    @property
    def name(self) -> str:
        """Name with a digest of the spec, so that a changed study keeps the results of unchanged lines."""
        return f"{self.row.name}.s{self.seed}.{digest({**self.spec, 'only_newest': self.only_newest})}"


def tuning_lines(config: StudyConfig, results: Results) -> list[StudyLine]:
    rows = config.tuning.rows if config.tuning else ()
    return [line for row in map(config.row, rows) for line in _grid(config, row, results)]


def study_lines(config: StudyConfig, results: Results) -> list[StudyLine]:
    """Lines whose peak rate is known already.

    All rows with the first seed come before any with the second.
    """
    peaks = [(row, peak_of(config, row, results)) for row in config.rows]
    return [
        _line(config, row, seed, peak_lr, only_newest=False)
        for seed in config.seeds
        for row, peak_lr in peaks
        if peak_lr is not None
    ]


def study_plan(config: StudyConfig, results: Results) -> list[StudyLine]:
    """All lines that are known already, each once, in training order."""
    lines = (*tuning_lines(config, results), *study_lines(config, results))
    return list({line.name: line for line in lines}.values())


def missing_lines(config: StudyConfig, results: Results) -> Iterator[StudyLine]:
    """Lines that can be trained next, because they have no settled result."""
    for line in study_plan(config, results):
        result = results.lines.get(line.name)
        if result is None or not result.settled:
            yield line


def num_lines(config: StudyConfig, results: Results) -> int:
    """Number of lines of the whole study, with the current extent of its grids.

    If the tuning seed is one of the study's seeds, the best line of a tuned row counts only once.
    """
    tuning = config.tuning
    count = len(config.rows) * len(config.seeds)
    if tuning is None:
        return count
    shared = [row for row in map(config.row, tuning.rows) if not row.is_from_scratch]
    return count + len(tuning_lines(config, results)) - (len(shared) if tuning.seed in config.seeds else 0)


def peak_of(config: StudyConfig, row: StudyRow, results: Results) -> float | None:
    """Peak rate of a row: the configured one or the best tuned one; None while tuning is unfinished."""
    tuning = config.tuning
    source = row.peak_of or row.name
    if tuning is None or source not in tuning.rows:
        return config.training_of(row).peak_lr
    tried = tuned(config, source, results)
    if any(result is None or not result.settled for result in tried.values()):
        return None
    scores = {peak_lr: score(result) for peak_lr, result in tried.items() if result is not None}
    best = min(scores, key=lambda peak_lr: scores[peak_lr])
    return best if math.isfinite(scores[best]) else None


def tuned(config: StudyConfig, row_name: str, results: Results) -> dict[float, LineResult | None]:
    """Results of a tuned row by peak rate."""
    lines = _grid(config, config.row(row_name), results)
    return {line.peak_lr: results.lines.get(line.name) for line in lines}


def tuned_peaks(config: StudyConfig, results: Results) -> tuple[float, ...]:
    """Peak rates of all tuned rows together, in ascending order."""
    return tuple(sorted({line.peak_lr for line in tuning_lines(config, results)}))


def score(result: LineResult) -> float:
    """Mean perplexity of the final version over all slices; infinite if the line is not complete."""
    return mean_perplexity(result.versions[-1]) if result.complete and result.versions else math.inf


def mean_perplexity(version: Measured) -> float:
    """Unweighted mean over the slices; infinite if one of them is not finite."""
    values = list(version.perplexities.values())
    if not values or any(value is None for value in values):
        return math.inf
    return math.fsum(value for value in values if value is not None) / len(values)


def results_by_row(config: StudyConfig, results: Results) -> dict[str, dict[int, LineResult]]:
    """Results of the complete lines of every row, by seed."""
    found: dict[str, dict[int, LineResult]] = {row.name: {} for row in config.rows}
    for line in study_lines(config, results):
        result = results.lines.get(line.name)
        if result is not None and result.complete:
            found[line.row.name][line.seed] = result
    return found


def _grid(config: StudyConfig, row: StudyRow, results: Results) -> list[StudyLine]:
    """Lines of a tuned row at every peak rate, ascending.

    Extended by one rate whenever the best one is at an end.
    """
    tuning = config.tuning
    assert tuning is not None
    grid = [_tuning_line(config, tuning, row, peak_lr) for peak_lr in sorted(tuning.peak_lrs)]
    for _ in range(tuning.widen):
        found = [results.lines.get(line.name) for line in grid]
        scores = [score(result) for result in found if result is not None and result.settled]
        if len(scores) < len(grid):
            break
        best = scores.index(min(scores))
        if best == 0:
            grid.insert(0, _tuning_line(config, tuning, row, _next_peak(grid[1], grid[0])))
        elif best == len(grid) - 1 and (peak_lr := _next_peak(grid[-2], grid[-1])) <= MAX_PEAK_LR:
            grid.append(_tuning_line(config, tuning, row, peak_lr))
        else:
            break
    return grid


def _next_peak(last_but_one: StudyLine, last: StudyLine) -> float:
    """Extend a grid by the ratio of its last two rates.

    Rounded, because the rate is part of the line's name.
    """
    return float(f"{last.peak_lr**2 / last_but_one.peak_lr:.6g}")


def _tuning_line(config: StudyConfig, tuning: Tuning, row: StudyRow, peak_lr: float) -> StudyLine:
    return _line(config, row, tuning.seed, peak_lr, only_newest=row.is_from_scratch)


def _line(config: StudyConfig, row: StudyRow, seed: int, peak_lr: float, *, only_newest: bool) -> StudyLine:
    spec = config.line_spec(row, dataset="d", name="m", seed=seed, peak_lr=peak_lr)
    return StudyLine(row, seed, peak_lr, only_newest, spec)
