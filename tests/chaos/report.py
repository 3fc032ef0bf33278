"""The report of a check: figures to print, and problems, which must be empty."""

from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_PROBLEMS = 100


@dataclass
class Report:
    title: str
    figures: dict[str, int | float | str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def require(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems.append(problem)


def table(reports: Sequence[Report]) -> str:
    lines = []
    for report in reports:
        lines.append(f"{report.title}: {'FAILED' if report.problems else 'passed'}")
        width = max((len(name) for name in report.figures), default=0)
        lines += [f"  {name:<{width}}  {_formatted(value):>10}" for name, value in report.figures.items()]
        lines += [f"  ! {problem}" for problem in report.problems[:MAX_PROBLEMS]]
        if len(report.problems) > MAX_PROBLEMS:
            lines.append(f"  ! and {len(report.problems) - MAX_PROBLEMS} more")
    return "\n".join(lines)


def _formatted(value: int | float | str) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else value
