"""`pathswitch demo`, as a new user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from api.cli.demo import Measurements, demo
from api.cli.errors import CliError


@pytest.mark.slow
@pytest.mark.ray
def test_three_versions_are_released_under_load_and_no_request_fails(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "api.cli.main", "demo", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    measured = json.loads(figures.read_text())
    assert measured["released"] == 3
    assert (measured["requests"]["failed"], measured["requests"]["mixed"]) == (0, 0)
    assert set(measured["requests"]["answered"]) == {"1", "2", "3"}
    assert measured["costs"]["ratio_to_from_scratch"] < 0.65


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(CliError, match="is not empty"):
        demo(tmp_path, keep=False, json_file=None)


def test_measurements_start_with_no_released_version() -> None:
    assert Measurements().num_released == 0
