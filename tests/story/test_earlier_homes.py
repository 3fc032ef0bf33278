"""A home of an earlier release is upgraded in place, keeps its trunk, and goes on to the bits that the release came to."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.release_home import MICRO, MODEL, go_on, line_of, make_home, service, unpack

HOMES = sorted((Path(__file__).parents[1] / "homes").iterdir())
COMPUTED = ("losses", "files")


@pytest.mark.parametrize("folder", HOMES, ids=lambda folder: folder.name)
def test_an_upgraded_home_goes_on_as_the_release_did(folder: Path, tmp_path: Path) -> None:
    expected = unpack(folder, tmp_path / "earlier")
    found = go_on(tmp_path / "earlier")

    assert without(found, COMPUTED) == without(expected, COMPUTED)
    for ours, theirs in zip(found["versions"], expected["versions"], strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-3)
    if computes_alike(tmp_path / "again", expected):
        assert found == expected


@pytest.mark.parametrize("folder", HOMES, ids=lambda folder: folder.name)
def test_a_new_model_finds_the_stages_of_the_earlier_release(folder: Path, tmp_path: Path) -> None:
    unpack(folder, tmp_path / "earlier")
    with service(tmp_path / "earlier") as (plane, executor, serving):
        plane.client.create_model(MICRO | {"name": "twin", "auto_update": False})
        plane.client.start_update("twin", data_version=1)
        plane.finish("twin", executor, serving)
        [update] = plane.client.updates("twin")
        assert [
            (stage.kind, stage.reused) for stage in update.stages if stage.kind not in ("gate", "release")
        ] == [
            (kind, True)
            for kind in ("tokenizer", "pack", "train_trunk", "train_branch", "export", "evaluate")
        ]
        assert line_of(plane)["versions"]
        assert plane.client.model_version("twin", 1).artifact == plane.client.model_version(MODEL, 1).artifact


def computes_alike(home: Path, expected: dict[str, Any]) -> bool:
    """Whether this machine's arithmetic comes to the release's bits: processors differ in how they add up."""
    make_home(home)
    with service(home) as (plane, _, _):
        first = line_of(plane)["versions"][0]
    return bool(first["files"] == expected["versions"][0]["files"])


def without(line: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    versions = [{k: v for k, v in version.items() if k not in names} for version in line["versions"]]
    return line | {"versions": versions}
