"""A home for `pathswitch up`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.up import kill_leftovers


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home. Its processes end with the test, even if the test fails."""
    yield tmp_path / "home"
    kill_leftovers(tmp_path / "home")
