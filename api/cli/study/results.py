"""What a study has measured so far: one JSON file, written after every line, that a later run of the study goes on from."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from api.cli.errors import CliError
from api.cli.study.config import StudyConfig
from api.cli.study.data import DataFile, StudyData
from service.core.spec import Spec

FILE = "results.json"


class Curve(Spec):
    """Training of one version: evenly thinned steps of the line, with the loss (nats per token) and the rate of each."""

    kind: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    rates: tuple[float, ...]

    def between(self, after: int, last: int) -> "Curve":
        """The part of it in which ``after`` < step <= ``last``."""
        kept = [index for index, step in enumerate(self.steps) if after < step <= last]
        return Curve(
            kind=self.kind,
            steps=tuple(self.steps[index] for index in kept),
            losses=tuple(self.losses[index] for index in kept),
            rates=tuple(self.rates[index] for index in kept),
        )


class Measured(Spec):
    """One version of a line. ``losses``, ``perplexities`` and ``bits_per_byte``: of every slice, by its version's label."""

    data_version: int
    losses: dict[str, float | None]
    perplexities: dict[str, float | None]
    bits_per_byte: dict[str, float | None]
    tokens: int
    flops: float
    device_seconds: float
    from_scratch_tokens: int
    branch_point: int
    final_step: int
    notes: dict[str, Any] = Field(default_factory=dict)
    curves: tuple[Curve, ...] = ()


class LineResult(Spec):
    """One row under one seed and peak rate. ``error``: why it has not every version."""

    row: str
    seed: int
    peak_lr: float
    only_newest: bool
    versions: tuple[Measured, ...]
    error: str | None = None

    @property
    def complete(self) -> bool:
        return self.error is None

    @property
    def settled(self) -> bool:
        """Whether it would come out the same again: another error may be gone the next time."""
        return self.error is None or self.error.startswith("diverged")


class DataUsed(Spec):
    label: str
    bytes: int
    sha256: str


class CommandRun(Spec):
    """One run of the command that made a part of the results."""

    command: str
    began: str
    ended: str
    lines: int
    machine: str


class Results(Spec):
    """``lines`` by the names of their models."""

    config: StudyConfig
    versions: tuple[DataUsed, ...]
    slices: tuple[DataUsed, ...]
    parts: tuple[CommandRun, ...] = ()
    lines: dict[str, LineResult] = Field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(version.label for version in self.versions)


def open_results(folder: Path, config: StudyConfig, data: StudyData) -> Results:
    """Those of an earlier part, under today's configuration; or none yet. Raises CliError where they are of other data."""
    fresh = Results(config=config, versions=_used(data.versions), slices=_used(data.slices))
    path = folder / FILE
    if not path.exists():
        return fresh
    before = read_results(path)
    if (before.versions, before.slices) != (fresh.versions, fresh.slices):
        raise CliError(f"{path} has the results of other data", "Give this study another --out.")
    return fresh.model_copy(update={"parts": before.parts, "lines": before.lines})


def read_results(path: Path) -> Results:
    try:
        return Results.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise CliError(f"{path} has no results of a study", str(error)) from error


def save_results(folder: Path, results: Results) -> None:
    """Whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f".{FILE}.new"
    written.write_text(results.model_dump_json(indent=None) + "\n")
    written.replace(folder / FILE)


def _used(bodies: tuple[DataFile, ...]) -> tuple[DataUsed, ...]:
    return tuple(DataUsed(label=body.label, bytes=len(body.content), sha256=body.sha256) for body in bodies)
