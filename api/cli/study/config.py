"""What a study compares: rows, each a paradigm with its settings, on the same data, model and seeds. One JSON file."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from api.cli.errors import CliError
from service.core.spec import Spec
from service.core.specs import (
    ArchitectureSpec,
    ModelSpec,
    Name,
    ParadigmSpec,
    PathSwitchingSpec,
    TokenizerSpec,
    TrainingSpec,
)

# A line is rejected only where its loss is not finite: a study measures what a gate would keep out.
_NO_GATE = {"max_new_loss_increase": 100.0, "max_old_loss_increase": 100.0}


class StudyModel(Spec):
    """What all rows have in common. ``training`` is what of a model's ``training`` differs from the defaults."""

    architecture: ArchitectureSpec = ArchitectureSpec(preset="tiny")
    tokenizer: TokenizerSpec | None = None
    training: dict[str, Any] = Field(default_factory=dict)


class StudyRow(Spec):
    """A line of the report's table. ``peak_of`` names the tuned row whose best peak rate it takes; by default its own."""

    name: Name
    paradigm: ParadigmSpec = PathSwitchingSpec()
    training: dict[str, Any] = Field(default_factory=dict)
    peak_of: Name | None = None
    about: str = ""

    @property
    def is_from_scratch(self) -> bool:
        return self.paradigm.name == "from_scratch"


class Tuning(Spec):
    """``rows`` are trained at every peak rate of the grid; the best by mean perplexity of the final version is theirs.

    Where a row's best is an end of its grid, the grid goes on there by the ratio of the last two, ``widen`` times at most.
    """

    rows: tuple[Name, ...]
    peak_lrs: tuple[float, ...] = Field(min_length=2)
    widen: int = Field(0, ge=0, le=16)
    seed: int = 0


class StudyConfig(Spec):
    """``baselines`` are from-scratch rows: the better one is what quality and cost are compared with."""

    name: Name
    about: str = ""
    model: StudyModel = StudyModel()
    rows: tuple[StudyRow, ...] = Field(min_length=1)
    baselines: tuple[Name, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    tuning: Tuning | None = None

    @model_validator(mode="after")
    def _names_hold(self) -> Self:
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError("two rows have the same name")
        tuned = set(self.tuning.rows) if self.tuning else set()
        lists = [self.seeds, *((self.tuning.rows, self.tuning.peak_lrs) if self.tuning else ())]
        if any(len(set(values)) < len(values) for values in lists):
            raise ValueError("a seed, a tuned row or a peak rate is named twice")
        if unknown := (tuned | set(self.baselines)) - set(names):
            raise ValueError(f"no row is named {', '.join(sorted(unknown))}")
        for name in self.baselines:
            if not self.row(name).is_from_scratch:
                raise ValueError(f"the baseline {name} is not from_scratch")
        for row in self.rows:
            if row.peak_of is not None and row.peak_of not in tuned:
                raise ValueError(f"{row.name} takes the peak of {row.peak_of}, which is not tuned")
            for seed, peak_lr in self._settings():
                try:
                    self.line_spec(row, dataset="d", name="m", seed=seed, peak_lr=peak_lr)
                except ValidationError as error:
                    raise ValueError(f"{row.name}: {_told(error)}") from error
        return self

    def _settings(self) -> Iterator[tuple[int, float | None]]:
        """Every seed and every peak rate that a line may be given."""
        yield from ((seed, None) for seed in self.seeds)
        if self.tuning is not None:
            yield from ((self.tuning.seed, peak_lr) for peak_lr in self.tuning.peak_lrs)

    def row(self, name: str) -> StudyRow:
        return next(row for row in self.rows if row.name == name)

    def training_of(self, row: StudyRow) -> TrainingSpec:
        """How the lines of a row train, but for their seeds and tuned peak rates."""
        spec = self.line_spec(row, dataset="d", name="m", seed=self.seeds[0], peak_lr=None)
        return TrainingSpec.model_validate(spec["training"])

    def line_spec(
        self, row: StudyRow, *, dataset: str, name: str, seed: int, peak_lr: float | None
    ) -> dict[str, Any]:
        """The model line of a row, as it is POSTed, with every default said: what a later default is, is another line.

        ``peak_lr`` None: as the row or the study say. Raises pydantic's ValidationError.
        """
        training = self.model.training | row.training | {"seed": seed}
        if peak_lr is not None:
            training["peak_lr"] = peak_lr
        body: dict[str, Any] = {
            "name": name,
            "dataset": dataset,
            "architecture": self.model.architecture.model_dump(mode="json", exclude_none=True),
            "paradigm": row.paradigm.model_dump(mode="json"),
            "training": training,
            "gate": _NO_GATE,
            "auto_update": False,
            "auto_release": False,
        }
        if self.model.tokenizer is not None:
            body["tokenizer"] = self.model.tokenizer.model_dump(mode="json", exclude_none=True)
        return ModelSpec.model_validate(body).model_dump(mode="json", exclude_none=True)


def _told(error: ValidationError) -> str:
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"]))) for item in error.errors()
    )


def load_config(path: Path) -> StudyConfig:
    """Raises CliError where the file is not there, not JSON, or no study."""
    try:
        return StudyConfig.model_validate_json(path.read_text())
    except OSError as error:
        raise CliError(f"{path} cannot be read", str(error)) from error
    except ValidationError as error:
        findings = [(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors()]
        raise CliError(f"{path} is not the configuration of a study", errors=findings) from error


def digest(body: Mapping[str, Any]) -> str:
    """A few hex digits of the canonical JSON."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]
