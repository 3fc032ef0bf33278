"""The rows of a benchmark's table, with a target for some of them."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Figure:
    """One row of the table. ``target`` is a minimum if ``at_least``, else a maximum; None: no target."""

    check: str
    metric: str
    value: float
    target: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.target is None:
            return True
        return self.value >= self.target if self.at_least else self.value <= self.target

    def line(self) -> str:
        target = "" if self.target is None else f"{'>=' if self.at_least else '<='} {self.target:g}"
        verdict = "" if self.target is None else "met" if self.met else "MISSED"
        return f"{self.check:<43}{self.metric:<35}{self.value:>10.2f}  {target:<7} {verdict}".rstrip()


def write(path: Path, figures: Mapping[str, Sequence[Figure]]) -> None:
    """Write the figures as JSON, with the machine they were measured on."""
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()}
    rows = {
        name: [asdict(figure) | {"met": figure.met} for figure in group] for name, group in figures.items()
    }
    path.write_text(json.dumps({"machine": machine, "figures": rows}, indent=1) + "\n")
