from pathlib import Path

import pytest

from tests.support.tiny_export import write_tiny_export


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model version."""
    folder = tmp_path_factory.mktemp("export")
    write_tiny_export(folder, seed=1)
    return folder
