"""Draws the trunk and its branches to scale, as text. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

HEAD = "trunk "
MIN_COLUMNS = 24


@dataclass(frozen=True)
class Branch:
    """The branch of a version: the step at which it leaves the trunk, and its last step."""

    version: int
    start: int
    end: int


def draw(branches: Sequence[Branch], width: int) -> list[str]:
    """Draw the trunk up to its last branch point, and a line for each branch.

    Branches are in order of their start.
    trunk ━━━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━━━━━┓
                     ┗━━╸          ┃             ┃      v1, steps 48 to 53
                                   ┗━━━━╸        ┃      v2, steps 95 to 105
                                                 ┗━━━━╸ v3, steps 143 to 158
    """
    if not branches:
        return []
    labels = [f" v{branch.version}, steps {branch.start:,} to {branch.end:,}" for branch in branches]
    columns = max(MIN_COLUMNS, width - len(HEAD) - max(map(len, labels)))
    scale = (columns - 1) / max(branch.end for branch in branches)
    starts = [round(branch.start * scale) for branch in branches]
    trunk = ["━"] * starts[-1] + ["┓"]
    for start in starts[:-1]:
        trunk[start] = "┳" if start < starts[-1] else "┓"
    lines = [HEAD + "".join(trunk)]
    for number, (branch, label) in enumerate(zip(branches, labels, strict=True)):
        line = [" "] * columns
        for later in starts[number + 1 :]:
            line[later] = "┃"
        start, end = starts[number], min(columns - 1, max(starts[number] + 1, round(branch.end * scale)))
        line[start : end + 1] = "┗" + "━" * (end - start - 1) + "╸"
        lines.append(" " * len(HEAD) + "".join(line) + label)
    return lines
