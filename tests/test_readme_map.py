"""README stays short, and its map names every source folder and nothing that does not exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAX_LINES = 150


def test_the_map_and_the_tree_agree() -> None:
    table = README.split("## The tree")[1].split("\n## ")[0]
    named = {name.rstrip("/") for name in re.findall(r"^\| `([\w/]+)/` \|", table, flags=re.M)}
    assert {name for name in named if not (ROOT / name).is_dir()} == set()
    packages = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("service", "workers")
        for path in (ROOT / top).glob("*/__init__.py")
    }
    assert packages <= named
    assert {"api", "migrations", "deploy", "docs", "tests"} <= named


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES
