"""Line charts in braille characters, each two dots wide and four dots high. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

DOTS_WIDE, DOTS_HIGH = 2, 4
# Bits of a braille character, by column and row of the dot.
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800
LABEL_WIDTH = 8


@dataclass(frozen=True)
class Series:
    """Points in order of x, joined by lines. A cell shared by two series has the colour of the later one."""

    points: Sequence[tuple[float, float]]
    style: str = ""


@dataclass(frozen=True)
class Frame:
    """The range of x and y that a chart shows."""

    x_min: float
    x_max: float
    y_min: float
    y_max: float

    @classmethod
    def around(cls, series: Sequence[Series], *, from_zero: bool) -> "Frame | None":
        """The range of all points, or None without points. A flat line is centred vertically."""
        xs = [x for one in series for x, _ in one.points]
        ys = [y for one in series for _, y in one.points]
        if not xs:
            return None
        low, high = (min(0.0, *ys) if from_zero else min(ys)), max(ys)
        if low == high:
            low, high = low - 0.5, high + 0.5
        return cls(min(xs), max(xs), low, high)


def chart(
    title: str, series: Sequence[Series], width: int, height: int, *, from_zero: bool = False
) -> list[Text]:
    """The chart's lines: the title, ``height`` rows with the range of y at the left, and the range of x."""
    columns = max(1, width - LABEL_WIDTH - 1)
    frame = Frame.around(series, from_zero=from_zero)
    rows = (
        [Text(" " * columns) for _ in range(height)]
        if frame is None
        else _plot(series, frame, columns, height)
    )
    labels = [""] * height
    if frame is not None:
        labels[0], labels[-1] = _number(frame.y_max), _number(frame.y_min)
    lines = [Text(title, style="bold")]
    lines += [
        Text.assemble((f"{label:>{LABEL_WIDTH}} ", "dim"), row)
        for label, row in zip(labels, rows, strict=True)
    ]
    ends = ("", "") if frame is None else (f"step {frame.x_min:,.0f}", f"{frame.x_max:,.0f}")
    lines.append(
        Text(f"{'':{LABEL_WIDTH}} {ends[0]}{ends[1]:>{max(0, columns - len(ends[0]))}}", style="dim")
    )
    return lines


def _plot(series: Sequence[Series], frame: Frame, columns: int, height: int) -> list[Text]:
    cells = [[_BLANK] * columns for _ in range(height)]
    styles = [[""] * columns for _ in range(height)]
    for one in series:
        for x, y in _dots(one.points, frame, columns * DOTS_WIDE, height * DOTS_HIGH):
            row, column = y // DOTS_HIGH, x // DOTS_WIDE
            cells[row][column] |= _BITS[x % DOTS_WIDE][y % DOTS_HIGH]
            styles[row][column] = one.style
    return [
        Text.assemble(*((chr(cell), style) for cell, style in zip(row, row_styles, strict=True)))
        for row, row_styles in zip(cells, styles, strict=True)
    ]


def _dots(
    points: Sequence[tuple[float, float]], frame: Frame, width: int, height: int
) -> set[tuple[int, int]]:
    """The dots on the line through the points. (0, 0) is at the top left."""
    corners = [
        (
            _scaled(x, frame.x_min, frame.x_max, width - 1),
            height - 1 - _scaled(y, frame.y_min, frame.y_max, height - 1),
        )
        for x, y in points
    ]
    found = set(corners)
    for (x1, y1), (x2, y2) in pairwise(corners):
        steps = max(abs(x2 - x1), abs(y2 - y1))
        found |= {
            (round(x1 + (x2 - x1) * i / steps), round(y1 + (y2 - y1) * i / steps)) for i in range(1, steps)
        }
    return found


def _scaled(value: float, low: float, high: float, size: int) -> int:
    return 0 if high == low else round((value - low) / (high - low) * size)


def _number(value: float) -> str:
    return f"{value:.3g}"
