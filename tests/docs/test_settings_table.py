"""docs/operations.md lists every setting with its default, and every other variable that the code reads."""

import re
from typing import Any

from service.settings import Settings
from tests.docs.pages import ROOT

TEXT = (ROOT / "docs" / "operations.md").read_text()
ROW = re.compile(r"^\| `(PATHSWITCH_\w+)` \| (?:`([^`]+)`|(none)) \| (.*?) \|", flags=re.M)
SIZES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def documented() -> dict[str, str | None]:
    """The default of every variable in the table of settings."""
    return {name: default or None for name, default, _, _ in ROW.findall(TEXT)}


def as_documented(default: Any) -> str | None:
    if default is None or default == ():
        return None
    return str(default)


def plain(text: str | None) -> str | None:
    """A size such as `64 MiB` as a number of bytes."""
    size = re.fullmatch(r"(\d+) (KiB|MiB|GiB)", text or "")
    return str(int(size[1]) * SIZES[size[2]]) if size else text


def test_the_table_has_every_setting_with_its_default() -> None:
    defaults = {
        f"PATHSWITCH_{name.upper()}": as_documented(field.default)
        for name, field in Settings.model_fields.items()
    }
    assert {name: plain(default) for name, default in documented().items()} == defaults


def test_sizes_and_times_name_their_unit() -> None:
    units = {name: unit for name, _, _, unit in ROW.findall(TEXT)}
    assert {unit for name, unit in units.items() if name.endswith("_BYTES")} == {"bytes"}
    assert {unit for name, unit in units.items() if name.endswith("_SECONDS")} == {"seconds"}


def test_every_variable_in_the_source_is_on_the_page() -> None:
    sources = [path for folder in ("service", "workers", "api") for path in (ROOT / folder).rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"PATHSWITCH_[A-Z_]*[A-Z]\b", path.read_text())}
    assert {name for name in read if f"`{name}`" not in TEXT} == set()
