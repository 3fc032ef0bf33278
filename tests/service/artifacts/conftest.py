"""An empty artifact store of each kind, and ways to damage a file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from service.artifacts import Artifacts, open_artifacts
from tests.support.artifacts import s3_url

Damage = Callable[[Path], None]


@pytest.fixture(params=["local", "s3"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    if request.param == "local":
        return open_artifacts((tmp_path / "artifacts").as_uri())
    request.getfixturevalue("s3")
    return open_artifacts(s3_url(tmp_path, "cache"))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)


@pytest.fixture(params=[_truncate, _lengthen, _flip_one_bit, Path.unlink], ids=lambda damage: damage.__name__)
def damage(request: pytest.FixtureRequest) -> Damage:
    damage: Damage = request.param
    return damage
