"""Figures of a study's report, as SVG."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from api.cli.study.analysis import Analysis, RowSummary, Spread
from api.cli.study.config import StudyRow
from api.cli.study.lines import score, tuned, tuned_peaks
from api.cli.study.plotting import (
    LINE_STYLES,
    PARADIGM_COLOURS,
    STYLE,
    VERSION_COLOURS,
    new_panels,
    to_svg,
    use_percent_scale,
)
from api.cli.study.results import Curve, LineResult
from service.core.stage_specs import StageKind

_MAX_PATHS = 12


def draw_figures(analysis: Analysis) -> dict[str, str]:
    """Draw all figures as SVG, by name. Figures without data are left out."""
    drawn: dict[str, Callable[[Analysis], Figure | None]] = {
        "quality": _quality,
        "growth": _growth,
        "tuning": _tuning,
        "rates": _rates,
        "losses": _losses,
        "forgetting": _forgetting,
    }
    figures = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in drawn.items():
            figure = draw(analysis)
            if figure is not None:
                figures[name] = to_svg(figure)
    return figures


def _quality(analysis: Analysis) -> Figure | None:
    """Quality over cost, one panel per version from the second on.

    Points have the row numbers of the report's table.
    """
    rows = [row for row in analysis.rows if row.final.gap is not None]
    count = len(analysis.labels) - 1
    if not rows or count < 1:
        return None
    columns = min(count, 2)
    figure, panels = new_panels(count, columns, 5.2, 3.6)
    for index, axes in enumerate(panels, 1):
        for number, row in enumerate(analysis.rows, 1):
            version = row.versions[index]
            if version.gap is None:
                continue
            colour = PARADIGM_COLOURS[row.row.paradigm.name]
            axes.errorbar(
                100 * version.cost_ratio,
                100 * version.gap.mean,
                yerr=100 * (version.gap.sd or 0),
                fmt="o",
                markersize=3.5,
                linewidth=0.8,
                color=colour,
            )
            axes.annotate(
                str(number),
                (100 * version.cost_ratio, 100 * version.gap.mean),
                xytext=(3, 3),
                textcoords="offset points",
                color=colour,
                fontsize=7,
            )
        axes.axhline(0, color="black", linewidth=0.6)
        use_percent_scale(axes)
        axes.set_title(f"{analysis.labels[index]}, compared with {analysis.baselines[index]}")
        axes.set_xlabel("tokens so far, % of training every version from scratch")
        axes.set_ylabel("mean perplexity, % above from scratch")
    return figure


def _growth(analysis: Analysis) -> Figure | None:
    """Cost and quality over the versions, for rows that differ in more than replay."""
    rows = _distinct(analysis)
    if not rows or len(analysis.labels) < 2:
        return None
    figure, (cost, quality) = new_panels(2, 2, 5.2, 3.6)
    for number, row in enumerate(rows):
        style: dict[str, Any] = {
            "color": PARADIGM_COLOURS[row.row.paradigm.name],
            "linestyle": LINE_STYLES[number % 4],
        }
        cost.plot(
            analysis.labels,
            [100 * version.cost_ratio for version in row.versions],
            label=row.row.name,
            **style,
        )
        gaps = [100 * version.gap.mean if version.gap else math.nan for version in row.versions]
        quality.plot(analysis.labels, gaps, label=row.row.name, **style)
        form = analysis.closed_form_ratio(row.row.name)
        if form is not None:
            cost.plot([analysis.labels[-1]], [100 * form], "x", color=style["color"])
    cost.set_ylabel("tokens so far, % of from scratch")
    cost.set_title("cost (x: closed form)")
    quality.set_ylabel("mean perplexity, % above from scratch")
    quality.set_title("quality")
    use_percent_scale(quality)
    quality.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _tuning(analysis: Analysis) -> Figure | None:
    """Quality over the peak learning rate, one curve per tuned row."""
    tuning = analysis.config.tuning
    if tuning is None:
        return None
    points = {
        name: [
            (peak, score(result))
            for peak, result in tuned(analysis.config, name, analysis.results).items()
            if result is not None and math.isfinite(score(result))
        ]
        for name in tuning.rows
    }
    if not any(points.values()):
        return None
    figure, [axes] = new_panels(1, 1, 5.2, 3.4)
    for number, (name, found) in enumerate(points.items()):
        if found:
            colour = PARADIGM_COLOURS[analysis.config.row(name).paradigm.name]
            peaks, scores = zip(*found, strict=True)
            axes.plot(
                peaks,
                scores,
                marker="o",
                markersize=3,
                label=name,
                color=colour,
                linestyle=LINE_STYLES[number % 4],
            )
    axes.set_xscale("log", base=2)
    peaks = tuned_peaks(analysis.config, analysis.results)
    axes.set_xticks(list(peaks), [f"{peak:g}" for peak in peaks])
    axes.set_yscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("mean perplexity, final version")
    axes.legend(fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _rates(analysis: Analysis) -> Figure | None:
    return _curves(analysis, "learning rate", lambda curve: curve.rates, rates=True)


def _losses(analysis: Analysis) -> Figure | None:
    return _curves(analysis, "loss, nats per token", lambda curve: curve.losses, rates=False)


def _curves(
    analysis: Analysis, label: str, values: Callable[[Curve], Sequence[float]], *, rates: bool
) -> Figure | None:
    """Curves over the steps of the line, one panel per row. The trunk is grey, versions are coloured."""
    found: list[tuple[str, LineResult]] = []
    for row in _distinct(analysis)[:_MAX_PATHS]:
        line = analysis.line(row.row.name)
        if line is not None and any(version.curves for version in line.versions):
            found.append((row.row.name, line))
    if not found:
        return None
    figure, panels = new_panels(len(found), 3, 3.4, 2.1)
    for axes, (name, line) in zip(panels, found, strict=True):
        for curve in analysis.trunk(name):
            axes.plot(curve.steps, values(curve), color="#999999", linewidth=1.6, zorder=1)
        for number, version in enumerate(line.versions):
            for curve in version.curves:
                if curve.kind != StageKind.TRAIN_TRUNK:
                    colour = VERSION_COLOURS[number % len(VERSION_COLOURS)]
                    axes.plot(curve.steps, values(curve), color=colour, linewidth=1.1, zorder=2)
        if rates:
            axes.set_ylim(bottom=0)
        else:
            axes.set_ylim(*_loss_range([*analysis.trunk(name), *_all_curves(line)]))
        axes.set_title(name, fontsize=8)
    figure.supxlabel("step of the line", fontsize=8)
    figure.supylabel(label, fontsize=8)
    return figure


def _forgetting(analysis: Analysis) -> Figure | None:
    """Perplexity of each version (down) on each slice (across), coloured by gap. One panel per row."""
    rows = [row for row in analysis.rows if row.final.gap is not None]
    if not rows:
        return None
    size = max(1.7, 0.42 * len(analysis.labels))
    figure, panels = new_panels(len(rows), 5, size * 1.15, size)
    norm = TwoSlopeNorm(vmin=-20, vcenter=0, vmax=20)
    for axes, row in zip(panels, rows, strict=True):
        gaps = [
            [_in_percent(version.slice_gaps.get(label)) for label in analysis.labels]
            for version in row.versions
        ]
        image = axes.imshow(gaps, cmap="RdBu_r", norm=norm, aspect="auto")
        # The default id is a hash of the pixels, which two rows may share.
        image.set_gid(f"map-{row.row.name}")
        for down, version in enumerate(row.versions):
            for across, label in enumerate(analysis.labels):
                spread = version.slice_perplexities.get(label)
                if spread is not None:
                    dark = abs(gaps[down][across]) > 14
                    axes.text(
                        across,
                        down,
                        f"{spread.mean:.0f}",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color="white" if dark else "black",
                    )
        axes.grid(False)
        axes.set_xticks(range(len(analysis.labels)), analysis.labels, fontsize=6)
        axes.set_yticks(range(len(analysis.labels)), analysis.labels, fontsize=6)
        axes.set_title(row.row.name, fontsize=6.5)
    return figure


def _distinct(analysis: Analysis) -> list[RowSummary]:
    """The first of all rows that differ only in replay."""
    seen: set[tuple[Any, ...]] = set()
    found = []
    for row in analysis.rows:
        key = _key_without_replay(row.row)
        if key not in seen:
            seen.add(key)
            found.append(row)
    return found


def _key_without_replay(row: StudyRow) -> tuple[Any, ...]:
    plain = row.paradigm.model_dump(mode="json")
    decay = plain.pop("decay", None) or {}
    return (str(plain), decay.get("shape"), decay.get("floor"), str(decay.get("length")))


def _all_curves(line: LineResult) -> list[Curve]:
    return [curve for version in line.versions for curve in version.curves]


def _loss_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """Range of the y axis.

    It cuts off the highest tenth of the losses, because those of the first steps would hide all detail.
    """
    losses = sorted(loss for curve in curves for loss in curve.losses)
    low, high = losses[0], losses[-1 - len(losses) // 10]
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def _in_percent(spread: Spread | None) -> float:
    return math.nan if spread is None else 100 * spread.mean
