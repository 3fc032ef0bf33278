"""Analyses a study: quality, cost and forgetting of every row, compared with training from scratch.

The gap of a row is its perplexity divided by that of the better baseline with the same seed, minus 1. The
better baseline of a version has the lower mean perplexity over all slices, averaged over seeds. The cost ratio
is the number of tokens of all versions so far, divided by the tokens of training each of them from scratch
(Σ E_i).
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from api.cli.study.config import StudyConfig, StudyRow
from api.cli.study.lines import mean_perplexity, results_by_row, study_plan
from api.cli.study.results import Curve, LineResult, Measured, Results
from service.core import costs
from service.core.forgetting import MeasuredVersion, backward_transfers
from service.core.stage_specs import StageKind


@dataclass(frozen=True)
class Spread:
    """Mean over seeds. ``sd`` is the sample standard deviation; None for a single seed."""

    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        found = list(values)
        if not found or not all(map(math.isfinite, found)):
            return None
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None)


@dataclass(frozen=True)
class VersionSummary:
    """One version of a row.

    Gaps are fractions: -0.01 means 1 % better than from scratch. None: not finite.
    """

    label: str
    perplexity: Spread | None
    gap: Spread | None
    slice_perplexities: dict[str, Spread | None]
    slice_gaps: dict[str, Spread | None]
    cost_ratio: float
    backward_transfer: Spread | None

    @property
    def newest_gap(self) -> Spread | None:
        return self.slice_gaps.get(self.label)

    @property
    def worst_slice_gap(self) -> float:
        gaps = [gap.mean if gap else math.inf for gap in self.slice_gaps.values()]
        return max(gaps, default=math.inf)


@dataclass(frozen=True)
class RowSummary:
    """All versions of a row, averaged over its seeds."""

    row: StudyRow
    peak_lr: float
    seeds: tuple[int, ...]
    versions: tuple[VersionSummary, ...]

    @property
    def final(self) -> VersionSummary:
        return self.versions[-1]


@dataclass(frozen=True)
class Target:
    """A target, and the rows that reach it. If none does, ``nearest`` is the row that misses it by least."""

    text: str
    reached: tuple[str, ...]
    nearest: str | None


class Analysis:
    """Analysis of results that may be incomplete. Rows without a complete line are left out."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.config: StudyConfig = results.config
        self.labels = results.labels
        self._lines = results_by_row(self.config, results)

    def line(self, row: str) -> LineResult | None:
        """The row's line with the first seed that is complete."""
        return next(iter(self._lines[row].values()), None)

    def trunk(self, row: str) -> list[Curve]:
        """Curves of the row's trunk without overlaps, including parts that were trained for another row."""
        own = self.line(row)
        spec = self.config.row(row)
        if own is None or spec.paradigm.name not in ("path_switching", "merge"):
            return []
        last = max((version.branch_point for version in own.versions), default=0)
        trunk: list[Curve] = []
        reached = 0
        for curve in sorted(
            self._trunk_curves(own, spec), key=lambda curve: (curve.steps[0], -curve.steps[-1])
        ):
            part = curve.between(reached, last)
            if part.steps:
                trunk.append(part)
                reached = part.steps[-1]
        return trunk

    def _trunk_curves(self, own: LineResult, spec: StudyRow) -> Iterator[Curve]:
        for planned in study_plan(self.config, self.results):
            line = self.results.lines.get(planned.name)
            shared = (planned.seed, planned.peak_lr, planned.row.training)
            if line is None or shared != (own.seed, own.peak_lr, spec.training):
                continue
            for version in line.versions:
                yield from (curve for curve in version.curves if curve.kind == StageKind.TRAIN_TRUNK)

    @cached_property
    def baselines(self) -> tuple[str | None, ...]:
        """The better baseline of every version; None if no baseline has been trained."""
        found = []
        for index in range(len(self.labels)):
            means = {
                name: spread.mean
                for name in self.config.baselines
                if (spread := Spread.of(self._perplexities(name, index))) is not None
            }
            found.append(min(means, key=lambda name: means[name]) if means else None)
        return tuple(found)

    @cached_property
    def rows(self) -> tuple[RowSummary, ...]:
        return tuple(self._summary(row) for row in self.config.rows if self._lines[row.name])

    def closed_form_ratio(self, row: str) -> float | None:
        """Cost ratio of path switching in closed form, with the actual branch lengths d_i.

        None for other paradigms. It is (T_1 + Σ_(1<i≤N) T_i / (1 - r) + Σ_(i<N) d_i) / Σ E_i, where T_i and
        E_i are tokens of new text and r is the trunk's replay fraction. If the last branch grows by its
        replay fraction R, its (1 - R)·d_N new tokens are (1 - R)·d_N / (1 - r) tokens of the stream, so that
        d_N·(R - r) / (1 - r) is added.
        """
        spec, line = self.config.row(row), self.line(row)
        if line is None or spec.paradigm.name != "path_switching":
            return None
        training, decay = self.config.training_of(spec), spec.paradigm.decay
        ends = [version.from_scratch_tokens for version in line.versions]
        stream = ends[0] + (ends[-1] - ends[0]) / (1 - training.replay_fraction)
        tokens = training.batch_rows * training.sequence_length
        branches = [version.notes["branch_steps"] * tokens for version in line.versions]
        if decay.replay_budget == "grown" and len(branches) > 1:
            trunk = training.replay_fraction
            stream += (
                branches[-1] * (decay.replay_fraction - trunk) / (1 - trunk) if decay.replay_fraction else 0
            )
        return costs.path_switching([round(stream)], branches) / costs.from_scratch(ends)

    def targets(self) -> tuple[Target, ...]:
        """The targets of path switching. Any row may reach them."""
        rows = [row for row in self.rows if not row.row.is_from_scratch]
        cheap, cheaper = (
            [row for row in rows if row.final.cost_ratio <= most + 1e-9] for most in (0.58, 0.50)
        )
        return (
            _target(
                "every slice of the final version is at least as good as from scratch, at no more than 58 % of the cost",
                [(row.row.name, row.final.worst_slice_gap) for row in cheap],
            ),
            _target(
                "mean perplexity of the final version is no higher than from scratch, at no more than 50 % of the cost",
                [(row.row.name, row.final.gap.mean if row.final.gap else math.inf) for row in cheaper],
            ),
            _target(
                "the newest slice is better than from scratch at every version from the second on",
                [(row.row.name, _worst_newest(row)) for row in rows],
            ),
        )

    def all_targets(self) -> tuple[str, ...]:
        """The rows that reach all targets."""
        first, *others = (set(target.reached) for target in self.targets())
        reached = first.intersection(*others)
        return tuple(row.row.name for row in self.rows if row.row.name in reached)

    def _perplexities(self, row: str, index: int) -> list[float]:
        return [mean_perplexity(line.versions[index]) for line in self._lines[row].values()]

    def _summary(self, row: StudyRow) -> RowSummary:
        lines = self._lines[row.name]
        first = next(iter(lines.values()))
        return RowSummary(
            row=row,
            peak_lr=first.peak_lr,
            seeds=tuple(lines),
            versions=tuple(self._version(row, index) for index in range(len(self.labels))),
        )

    def _version(self, row: StudyRow, index: int) -> VersionSummary:
        lines = self._lines[row.name]
        baseline = self.baselines[index]
        baseline_lines = self._lines[baseline] if baseline is not None else {}
        pairs = [
            (line.versions[index], baseline_lines[seed].versions[index])
            for seed, line in lines.items()
            if seed in baseline_lines
        ]
        first = next(iter(lines.values())).versions
        measured = self.labels[: index + 1]
        return VersionSummary(
            label=self.labels[index],
            perplexity=Spread.of(self._perplexities(row.name, index)),
            gap=Spread.of(mean_perplexity(one) / mean_perplexity(other) - 1 for one, other in pairs),
            slice_perplexities={
                label: Spread.of(_on(line.versions[index], label) for line in lines.values())
                for label in measured
            },
            slice_gaps={
                label: Spread.of(_on(one, label) / _on(other, label) - 1 for one, other in pairs)
                for label in measured
            },
            cost_ratio=sum(version.tokens for version in first[: index + 1])
            / costs.from_scratch([version.from_scratch_tokens for version in first[: index + 1]]),
            backward_transfer=Spread.of(
                transfer
                for line in lines.values()
                if (transfer := _backward_transfers(line, self.labels)[index]) is not None
            ),
        )


def _on(version: Measured, label: str) -> float:
    value = version.perplexities.get(label)
    return math.nan if value is None else value


def _backward_transfers(line: LineResult, labels: Sequence[str]) -> tuple[float | None, ...]:
    versions = [
        MeasuredVersion(
            number, version.data_version, {name: {"loss": loss} for name, loss in version.losses.items()}
        )
        for number, version in enumerate(line.versions, 1)
    ]
    return backward_transfers(versions, {label: number for number, label in enumerate(labels, 1)})


def _worst_newest(row: RowSummary) -> float:
    gaps = [version.newest_gap for version in row.versions[1:]]
    # The target is to be better, so that an equal perplexity must miss it.
    return max((gap.mean + 1e-12 if gap else math.inf for gap in gaps), default=math.inf)


def _target(text: str, misses: Sequence[tuple[str, float]]) -> Target:
    """Build a target. ``misses`` says by how much each row misses it; 0 or less means that it is reached."""
    reached = tuple(name for name, miss in misses if miss <= 0)
    finite = [(miss, name) for name, miss in misses if math.isfinite(miss)]
    nearest = f"{min(finite)[1]} ({min(finite)[0]:+.1%})" if finite and not reached else None
    return Target(text, reached, nearest)
