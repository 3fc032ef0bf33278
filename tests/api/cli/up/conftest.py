"""A home for `pathswitch up`."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.cli.up.running import started_on


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home of whose processes none outlives the test, also where that fails."""
    yield tmp_path / "home"
    for process in started_on(tmp_path / "home"):
        os.kill(process.pid, signal.SIGKILL)
