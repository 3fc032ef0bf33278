"""Plotting style of a study's figures: colours, panels, axes and SVG output."""

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, NullLocator

# The palette of Okabe and Ito, which colour-blind readers can distinguish.
PARADIGM_COLOURS = {
    "from_scratch": "#000000",
    "continual": "#D55E00",
    "path_switching": "#0072B2",
    "wsd_s": "#009E73",
    "merge": "#CC79A7",
}
VERSION_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#8C564B", "#7F7F7F", "#BCBD22")
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pathswitch",  # makes the ids, and so the file, reproducible
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
LINE_STYLES = ("-", "--", ":", "-.")


def new_panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of ``count`` panels. ``width`` and ``height`` are the size of one panel in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    panels = [axes for line in grid for axes in line]
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def use_percent_scale(axes: Axes) -> None:
    """Scale the y axis finely around 0 and coarsely far from it."""
    axes.set_yscale("symlog", linthresh=10, linscale=2)
    ticks = (-50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50, 100, 200)
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter(FormatStrFormatter("%+d"))
    axes.yaxis.set_minor_locator(NullLocator())


def to_svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = file.getvalue()
    return "\n".join(line.rstrip() for line in text[text.index("<svg") :].splitlines()) + "\n"
