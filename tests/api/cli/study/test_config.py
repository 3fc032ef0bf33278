"""Study configurations: errors are reported before training, and line names identify specs."""

import json
from pathlib import Path
from typing import Any

import pytest

from api.cli.errors import CliError
from api.cli.study.config import StudyConfig, load_config
from api.cli.study.lines import study_lines
from service.core.paradigms import PARADIGMS
from tests.support.study import SCRATCH, no_results, plain_study

STUDIES = Path(__file__).parents[4] / "deploy" / "study"
PATH: dict[str, Any] = {"name": "path"}
TUNING = {"rows": ["path"], "peak_lrs": [0.001, 0.002]}


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_studies_have_distinct_rows_and_all_but_one_have_every_paradigm(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert {row.paradigm.name for row in config.rows} == set(PARADIGMS) or path.stem == "small-version"
    specs = [config.line_spec(row, dataset="d", name="m", seed=0, peak_lr=0.001) for row in config.rows]
    assert len({json.dumps(spec, sort_keys=True) for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (plain_study(PATH, PATH), "two rows have the same name"),
        (plain_study(PATH, baselines=["path"]), "the baseline path must have the paradigm from_scratch"),
        (plain_study(PATH, baselines=["scratch", "nobody"]), "no row is named nobody"),
        (plain_study(PATH, tuning=TUNING | {"rows": ["path", "nobody"]}), "no row is named nobody"),
        (
            plain_study(PATH, PATH | {"name": "other", "peak_of": "scratch"}, tuning=TUNING),
            "other has peak_of scratch, which is not in tuning.rows",
        ),
        (plain_study(PATH | {"peak_of": "path"}), "path has peak_of path, which is not in tuning.rows"),
        (plain_study(PATH | {"training": {"warmup": 3}}), "path: training.warmup: "),
        (plain_study(PATH, model={"training": {"batch_tokens": 4}}), "training.batch_tokens: "),
        (plain_study(PATH, tuning=TUNING | {"peak_lrs": [0.001, 2]}), "training.peak_lr: "),
        (plain_study(PATH, seeds=[0, -1]), "training.seed: "),
        (plain_study(PATH, seeds=[1, 1]), "is listed twice"),
        (plain_study(PATH, tuning=TUNING | {"peak_lrs": [0.001, 0.001]}), "is listed twice"),
        (plain_study(PATH, tuning=TUNING | {"peak_lrs": [0.001]}), "tuning.peak_lrs: "),
        (plain_study(PATH | {"paradigms": {}}), "rows.1.paradigms: "),
        (plain_study(PATH | {"paradigm": {"name": "astrology"}}), "rows.1.paradigm: "),
        (plain_study(SCRATCH | {"name": "Not A Name"}), "rows.1.name: "),
    ],
)
def test_an_invalid_study_is_reported(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    path = tmp_path / "study.json"
    path.write_text(json.dumps(config))
    with pytest.raises(CliError) as caught:
        load_config(path)
    assert caught.value.title == f"{path} is not a valid study configuration"
    assert message in caught.value.block()


def test_a_missing_file_or_invalid_json_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="cannot read"):
        load_config(tmp_path / "nowhere.json")
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(CliError, match="is not a valid study configuration"):
        load_config(tmp_path / "study.json")


MODEL = {"training": {"warmup_steps": 3, "weight_decay": 0.2}}


def names(*rows: dict[str, Any], **changes: Any) -> list[str]:
    """Names of all lines of a study, which is read from JSON as a file would be."""
    config = StudyConfig.model_validate_json(json.dumps(plain_study(*rows, **({"model": MODEL} | changes))))
    return [line.name for line in study_lines(config, no_results(config))]


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        (PATH, {"model": {"training": {"weight_decay": 0.2, "warmup_steps": 3}}}),
        (PATH | {"training": {"warmup_steps": 3}}, {"model": {"training": {"weight_decay": 0.2}}}),
        (PATH | {"training": {"peak_lr": 2e-3}}, {}),  # the default
        (PATH | {"paradigm": {"name": "path_switching", "decay": {"shape": "1-sqrt"}}}, {}),
        (PATH | {"training": {"sequence_length": 128}}, {}),
        (PATH | {"about": "another text"}, {"about": "another text", "name": "renamed"}),
    ],
)
def test_a_line_keeps_its_name_however_its_spec_is_written(
    row: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert names(row, **changes)[1] == names(PATH)[1]


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        (PATH | {"name": "other"}, {}),
        (PATH | {"training": {"peak_lr": 0.001}}, {}),
        (PATH | {"training": {"warmup_steps": 4}}, {}),
        (PATH | {"paradigm": {"name": "merge"}}, {}),
        (PATH | {"paradigm": {"name": "path_switching", "decay": {"replay_fraction": 0.1}}}, {}),
        (PATH, {"seeds": [1]}),
        (PATH, {"model": MODEL | {"tokenizer": {"train": {"vocab_size": 512}}}}),
        (PATH, {"model": MODEL | {"architecture": {"preset": "small"}}}),
    ],
)
def test_a_line_with_another_spec_has_another_name(row: dict[str, Any], changes: dict[str, Any]) -> None:
    [_, before], [_, after] = names(PATH), names(row, **changes)
    assert before != after
