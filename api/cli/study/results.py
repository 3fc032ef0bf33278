"""Results of a study so far: one JSON file, saved after every line, from which a later run continues."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from api.cli.errors import CliError
from api.cli.study.config import StudyConfig
from api.cli.study.data import DataFile, StudyData
from service.core.spec import Spec

FILE = "results.json"


class Curve(Spec):
    """Training curve of one version: evenly thinned steps with losses (nats per token) and learning rates."""

    kind: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    rates: tuple[float, ...]

    def between(self, after: int, last: int) -> "Curve":
        """The part of the curve with ``after`` < step <= ``last``."""
        kept = [index for index, step in enumerate(self.steps) if after < step <= last]
        return Curve(
            kind=self.kind,
            steps=tuple(self.steps[index] for index in kept),
            losses=tuple(self.losses[index] for index in kept),
            rates=tuple(self.rates[index] for index in kept),
        )


class Measured(Spec):
    """Measurements of one version.

    ``losses``, ``perplexities`` and ``bits_per_byte`` are keyed by the label of the slice's data version.
    """

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
    """Result of one row with one seed and peak rate. ``error`` says why versions are missing."""

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
        """Whether training again would give the same result. Errors other than divergence may be transient."""
        return self.error is None or self.error.startswith("diverged")


class DataUsed(Spec):
    """Identity of a data version or slice that the study uses."""

    label: str
    bytes: int
    sha256: str


class CommandRun(Spec):
    """One run of the command, which added results."""

    command: str
    began: str
    ended: str
    lines: int
    machine: str


class Results(Spec):
    """All results. ``lines`` are keyed by line name; ``parts`` are runs of the command."""

    config: StudyConfig
    versions: tuple[DataUsed, ...]
    slices: tuple[DataUsed, ...]
    parts: tuple[CommandRun, ...] = ()
    lines: dict[str, LineResult] = Field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(version.label for version in self.versions)


def open_results(folder: Path, config: StudyConfig, data: StudyData) -> Results:
    """Results of earlier runs, with the current configuration.

    Raises CliError if they belong to other data.
    """
    fresh = Results(config=config, versions=_used(data.versions), slices=_used(data.slices))
    path = folder / FILE
    if not path.exists():
        return fresh
    earlier = read_results(path)
    if (earlier.versions, earlier.slices) != (fresh.versions, fresh.slices):
        raise CliError(f"{path} has results for different data", "Choose another folder with --out.")
    return fresh.model_copy(update={"parts": earlier.parts, "lines": earlier.lines})


def read_results(path: Path) -> Results:
    try:
        return Results.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise CliError(f"{path} is not a valid results file", str(error)) from error


def save_results(folder: Path, results: Results) -> None:
    """Write the results atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    new_file = folder / f".{FILE}.new"
    new_file.write_text(results.model_dump_json(indent=None) + "\n")
    new_file.replace(folder / FILE)


def _used(bodies: tuple[DataFile, ...]) -> tuple[DataUsed, ...]:
    return tuple(DataUsed(label=body.label, bytes=len(body.content), sha256=body.sha256) for body in bodies)
