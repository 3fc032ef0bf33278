"""Configuration of a study: rows to compare on the same data, model and seeds; each row is a paradigm."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from api.cli.errors import CliError
from service.core.paradigm_specs import ParadigmSpec, PathSwitchingSpec
from service.core.spec import Spec
from service.core.specs import ArchitectureSpec, ModelSpec, Name, TokenizerSpec, TrainingSpec

# A study must also measure versions that a gate would reject, so only a non-finite loss rejects a version.
_NO_GATE = {"max_new_loss_increase": 100.0, "max_old_loss_increase": 100.0}


class StudyModel(Spec):
    """The model of all rows. ``training`` holds the training fields that differ from the defaults."""

    architecture: ArchitectureSpec = ArchitectureSpec(preset="tiny")
    tokenizer: TokenizerSpec | None = None
    training: dict[str, Any] = Field(default_factory=dict)


class StudyRow(Spec):
    """A row of the report's table.

    ``peak_of`` names the tuned row whose best peak rate this row uses; by default its own.
    """

    name: Name
    paradigm: ParadigmSpec = PathSwitchingSpec()
    training: dict[str, Any] = Field(default_factory=dict)
    peak_of: Name | None = None
    about: str = ""

    @property
    def is_from_scratch(self) -> bool:
        return self.paradigm.name == "from_scratch"


class Tuning(Spec):
    """Trains ``rows`` at every peak rate of a grid.

    The rate with the lowest mean perplexity of the final version wins. If the best rate is at an end of the
    grid, the grid is extended there by the ratio of its last two rates, at most ``widen`` times.
    """

    rows: tuple[Name, ...]
    peak_lrs: tuple[float, ...] = Field(min_length=2)
    widen: int = Field(0, ge=0, le=16)
    seed: int = 0


class StudyConfig(Spec):
    """A study. ``baselines`` are from-scratch rows; quality and cost are compared with the better one."""

    name: Name
    about: str = ""
    model: StudyModel = StudyModel()
    rows: tuple[StudyRow, ...] = Field(min_length=1)
    baselines: tuple[Name, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    tuning: Tuning | None = None

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError("two rows have the same name")
        tuned = set(self.tuning.rows) if self.tuning else set()
        lists = [self.seeds, *((self.tuning.rows, self.tuning.peak_lrs) if self.tuning else ())]
        if any(len(set(values)) < len(values) for values in lists):
            raise ValueError("a seed, a tuned row or a peak rate is listed twice")
        if unknown := (tuned | set(self.baselines)) - set(names):
            raise ValueError(f"no row is named {', '.join(sorted(unknown))}")
        for name in self.baselines:
            if not self.row(name).is_from_scratch:
                raise ValueError(f"the baseline {name} must have the paradigm from_scratch")
        for row in self.rows:
            if row.peak_of is not None and row.peak_of not in tuned:
                raise ValueError(f"{row.name} has peak_of {row.peak_of}, which is not in tuning.rows")
            for seed, peak_lr in self._settings():
                try:
                    self.line_spec(row, dataset="d", name="m", seed=seed, peak_lr=peak_lr)
                except ValidationError as error:
                    raise ValueError(f"{row.name}: {_messages(error)}") from error
        return self

    def _settings(self) -> Iterator[tuple[int, float | None]]:
        """Every combination of seed and peak rate that a line may use."""
        yield from ((seed, None) for seed in self.seeds)
        if self.tuning is not None:
            yield from ((self.tuning.seed, peak_lr) for peak_lr in self.tuning.peak_lrs)

    def row(self, name: str) -> StudyRow:
        return next(row for row in self.rows if row.name == name)

    def training_of(self, row: StudyRow) -> TrainingSpec:
        """Training spec of a row's lines, except for their seeds and tuned peak rates."""
        spec = self.line_spec(row, dataset="d", name="m", seed=self.seeds[0], peak_lr=None)
        return TrainingSpec.model_validate(spec["training"])

    def line_spec(
        self, row: StudyRow, *, dataset: str, name: str, seed: int, peak_lr: float | None
    ) -> dict[str, Any]:
        """The body that creates the model line of a row, with all defaults filled in.

        If a later release changes a default, the line gets another name. If ``peak_lr`` is None, the row or the study
        sets the rate. Raises pydantic's ValidationError.
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


def _messages(error: ValidationError) -> str:
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"]))) for item in error.errors()
    )


def load_config(path: Path) -> StudyConfig:
    """Read the configuration. Raises CliError if the file is missing, not JSON, or not a valid study."""
    try:
        return StudyConfig.model_validate_json(path.read_text())
    except OSError as error:
        raise CliError(f"cannot read {path}", str(error)) from error
    except ValidationError as error:
        errors = [(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors()]
        raise CliError(f"{path} is not a valid study configuration", errors=errors) from error


def digest(body: Mapping[str, Any]) -> str:
    """Eight hex digits of the SHA-256 of the canonical JSON."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]
