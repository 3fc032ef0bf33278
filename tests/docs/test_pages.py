"""The pages are in order: links resolve, generated parts are up to date, lines are short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, blocks, prose

INFOS = {"text", "json", "mermaid", "sh", "sh norun", "python", "python norun"}
MAX_COLUMNS = 100
MAX_STUDY_BYTES = 1_000_000
HISTORY = {"CHANGELOG.md"}
GENERATED = {"report.md"}  # by `pathswitch study`


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_to_existing_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_the_text_exist(page: Path) -> None:
    if page.name in HISTORY:
        return
    named = re.findall(r"`((?:service|workers|api|migrations|deploy|docs|tests)/[\w./-]*)`", prose(page))
    assert {name for name in named if not (ROOT / name).exists()} == set()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_prose_wraps_at_100_columns(page: Path) -> None:
    if page.name in GENERATED:
        return
    lines = [line for line in prose(page).splitlines() if not line.startswith("|") and "](" not in line]
    assert [line for line in lines if len(line) > MAX_COLUMNS] == []


def test_every_block_says_what_it_is() -> None:
    """A shell or Python block runs in test_snippets.py unless it is marked `norun`."""
    assert [block.name for page in PAGES for block in blocks(page) if block.info not in INFOS] == []


STUDIES = sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/study/*/results.json"))


@pytest.mark.parametrize(
    "command", [["docs/architecture.py", "--check"], ["docs/study/publish.py", "--check", *STUDIES]]
)
def test_generated_pages_are_up_to_date(command: list[str]) -> None:
    checked = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr


def test_committed_studies_are_smaller_than_a_megabyte() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "docs/study"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    files = [ROOT / name for name in listed.stdout.split() if (ROOT / name).exists()]
    assert sum(path.stat().st_size for path in files) < MAX_STUDY_BYTES
