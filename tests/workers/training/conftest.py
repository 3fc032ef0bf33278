"""One prepared line, of which every test trains its own copy."""

import shutil
from pathlib import Path

import pytest

from service.artifacts import LocalArtifacts
from tests.support.training import SmallLine, Trainer, prepare_line


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SmallLine]:
    root = tmp_path_factory.mktemp("prepared")
    return root, prepare_line(LocalArtifacts(root))


@pytest.fixture
def small(prepared: tuple[Path, SmallLine]) -> SmallLine:
    """A line with 15 steps in data version 1 and 38 in version 2."""
    return prepared[1]


@pytest.fixture
def trainer(prepared: tuple[Path, SmallLine], tmp_path: Path) -> Trainer:
    shutil.copytree(prepared[0], tmp_path / "artifacts")
    return Trainer(LocalArtifacts(tmp_path / "artifacts"))


@pytest.fixture
def other_trainer(prepared: tuple[Path, SmallLine], tmp_path: Path) -> Trainer:
    """A second trainer, with its own copy of the artifacts."""
    shutil.copytree(prepared[0], tmp_path / "other")
    return Trainer(LocalArtifacts(tmp_path / "other"))
