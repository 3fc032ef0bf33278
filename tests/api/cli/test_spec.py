"""The spec of a model, built from options."""

import json
from pathlib import Path

import pytest

from api.cli.errors import CliError
from api.cli.spec import spec_of_file, spec_of_options, with_settings


def test_fields_without_an_option_are_left_to_the_service() -> None:
    assert spec_of_options("m", "d", None, None, None) == {"name": "m", "dataset": "d"}


def test_an_architecture_is_a_preset_a_config_or_a_base(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama"}')
    assert spec_of_options("m", "d", "tiny", None, None)["architecture"] == {"preset": "tiny"}
    assert spec_of_options("m", "d", None, config, None)["architecture"] == {
        "config": {"model_type": "llama"}
    }
    assert spec_of_options("m", "d", None, None, tmp_path)["architecture"] == {"base": str(tmp_path)}
    with pytest.raises(CliError, match="one of --preset"):
        spec_of_options("m", "d", "tiny", config, None)


def test_settings_are_json_or_text_at_any_depth() -> None:
    spec = {"name": "m", "training": {"seed": 1}}
    changed = with_settings(
        spec,
        [
            "training.peak_lr=2e-3",
            "auto_release=false",
            "paradigm.decay.shape=linear",
            "paradigm.decay.cuts=[1]",
        ],
    )
    assert changed == {
        "name": "m",
        "training": {"seed": 1, "peak_lr": 2e-3},
        "auto_release": False,
        "paradigm": {"decay": {"shape": "linear", "cuts": [1]}},
    }
    assert spec == {"name": "m", "training": {"seed": 1}}, "the argument must not change"


@pytest.mark.parametrize("assignment", ["training", "=1", "training..x=1", "name.x=1"])
def test_an_invalid_assignment_is_named_in_the_error(assignment: str) -> None:
    with pytest.raises(CliError, match=f"--set {assignment}"):
        with_settings({"name": "m"}, [assignment])


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_file_that_is_not_a_json_object_is_an_error(tmp_path: Path, content: str) -> None:
    file = tmp_path / "spec.json"
    file.write_text(content)
    with pytest.raises(CliError, match=r"spec\.json is not"):
        spec_of_file(file)
    file.write_text(json.dumps({"name": "m"}))
    assert spec_of_file(file) == {"name": "m"}
