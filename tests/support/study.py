"""Synthetic studies: configurations of a few rows, and results of their lines without training."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from api.cli.study.config import StudyConfig
from api.cli.study.data import DataFile, StudyData
from api.cli.study.lines import StudyLine, missing_lines
from api.cli.study.results import Curve, DataUsed, LineResult, Measured, Results
from service.core.stage_specs import StageKind
from service.ingest.formats import DataFormat

VERSION_STEPS = 100
STEP_TOKENS = 1000
CURVE_STRIDE = 10

FIXED = {"name": "path_switching", "decay": {"length": {"rule": "fixed", "fraction": 0.6}}}
SCRATCH = {"name": "scratch", "paradigm": {"name": "from_scratch", "schedule": "wsd"}}

# Perplexity of a line's version on a slice, both numbered from 1. None: not finite.
Quality = Callable[[StudyLine, int, int], float | None]
MakeUp = Callable[[StudyLine], LineResult]


def study_of(*rows: dict[str, Any], **changes: Any) -> StudyConfig:
    return StudyConfig.model_validate(plain_study(*rows, **changes))


def plain_study(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The JSON of a study; by default with one from-scratch row, one seed and no replay."""
    model = {"training": {"sequence_length": 100, "batch_tokens": STEP_TOKENS, "replay_fraction": 0.0}}
    plain = {"name": "made-up", "model": model, "rows": [SCRATCH, *rows], "baselines": ["scratch"]}
    return plain | changes


def no_results(config: StudyConfig, versions: int = 2) -> Results:
    data = data_of(*([f"text {n}"] for n in range(versions)))
    used = tuple(
        DataUsed(label=body.label, bytes=len(body.content), sha256=body.sha256) for body in data.versions
    )
    return Results(config=config, versions=used, slices=used)


def data_of(*versions: Sequence[str], slices: Sequence[Sequence[str]] = ()) -> StudyData:
    return StudyData(
        tuple(_body(n, texts) for n, texts in enumerate(versions, 1)),
        tuple(_body(n, texts) for n, texts in enumerate(slices, 1)),
    )


def write_documents(path: Path, documents: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def trained(results: Results, make_up: MakeUp) -> Results:
    """Results of a finished study, with synthetic results for every line that it needs."""
    asked: set[str] = set()
    while lines := [line for line in missing_lines(results.config, results) if line.name not in asked]:
        asked |= {line.name for line in lines}
        results = with_lines(results, {line.name: make_up(line) for line in lines})
    return results


def with_lines(results: Results, lines: dict[str, LineResult]) -> Results:
    return results.model_copy(update={"lines": results.lines | lines})


def measuring(quality: Quality, versions: int) -> MakeUp:
    """A function that makes results of lines.

    Versions have VERSION_STEPS steps and the cost of their paradigm.
    """

    def make_up(line: StudyLine) -> LineResult:
        numbers = [versions] if line.only_newest else range(1, versions + 1)
        measured = (_measured(line, number, quality) for number in numbers)
        return result_of(line, *measured)

    return make_up


def result_of(line: StudyLine, *versions: Measured, error: str | None = None) -> LineResult:
    return LineResult(
        row=line.row.name,
        seed=line.seed,
        peak_lr=line.peak_lr,
        only_newest=line.only_newest,
        versions=versions,
        error=error,
    )


def _measured(line: StudyLine, number: int, quality: Quality) -> Measured:
    perplexities = {f"v{n}": quality(line, number, n) for n in range(1, number + 1)}
    losses = {name: math.log(value) if value is not None else None for name, value in perplexities.items()}
    end, paradigm = number * VERSION_STEPS, line.row.paradigm
    steps, branch_point, notes, kind = VERSION_STEPS, end - VERSION_STEPS, {}, StageKind.TRAIN
    if paradigm.name == "from_scratch":
        steps, branch_point = end, 0
    elif paradigm.name == "merge":
        branch_point = end
    elif paradigm.name == "path_switching":
        length = paradigm.decay.length
        branch = round(VERSION_STEPS * (length.fraction if length.rule == "fixed" else 0.1))
        steps, branch_point = VERSION_STEPS + (branch if number > 1 else 0), end - branch
        notes, kind = {"branch_steps": branch}, StageKind.TRAIN_BRANCH
    curves = [_curve(StageKind.TRAIN_TRUNK, end - steps, branch_point), _curve(kind, branch_point, end)]
    return Measured(
        data_version=number,
        losses=losses,
        perplexities=perplexities,
        bits_per_byte=losses,
        tokens=steps * STEP_TOKENS,
        flops=1e9 * steps,
        device_seconds=0.1 * steps,
        from_scratch_tokens=end * STEP_TOKENS,
        branch_point=branch_point,
        final_step=end,
        notes=notes,
        curves=tuple(curve for curve in curves if curve.steps),
    )


def _curve(kind: StageKind, after: int, last: int) -> Curve:
    steps = tuple(range(after + CURVE_STRIDE, last + 1, CURVE_STRIDE))
    return Curve(
        kind=kind, steps=steps, losses=tuple(6 - step / 1000 for step in steps), rates=(0.01,) * len(steps)
    )


def _body(number: int, texts: Sequence[str]) -> DataFile:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    return DataFile(f"v{number}", lines.encode(), DataFormat.NDJSON)
