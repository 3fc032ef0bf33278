"""README's map names every source folder, and nothing that does not exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_map_and_the_tree_agree() -> None:
    table = (ROOT / "README.md").read_text().split("## The tree")[1].split("\n## ")[0]
    named = {name.rstrip("/") for name in re.findall(r"^\| `([\w/]+)/` \|", table, flags=re.M)}
    assert all((ROOT / name).is_dir() for name in named)
    for package in ("service", "workers"):
        inside = {p.parent.relative_to(ROOT).as_posix() for p in (ROOT / package).glob("*/__init__.py")}
        assert inside <= named
    assert {"api", "migrations", "deploy", "tests"} <= named
