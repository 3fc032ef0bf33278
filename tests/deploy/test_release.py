"""The release script refuses what is not ready, prints what it would do, and tags with the changelog's section."""

import subprocess
from pathlib import Path

import pytest

from deploy.release import ReleaseSteps, changelog_sections, find_problems, main

CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.0] - 2026-11-29

### Added

- A thing.

## [1.1.0] - 2026-10-01

- Another thing.
"""


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=tests", "-c", "user.email=tests@example.com", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that is ready for version 1.2.0."""
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "tests")
        monkeypatch.setenv(f"{name}_EMAIL", "tests@example.com")
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling>=1.27"]\n[project]\nname = "pathswitch"\nversion = "1.2.0"\n'
    )
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "all")
    return tmp_path


def test_a_clean_tree_on_main_with_version_and_changelog_is_ready(root: Path) -> None:
    assert list(find_problems(root, "1.2.0")) == []


def test_every_problem_is_named_with_its_remedy(root: Path) -> None:
    git(root, "tag", "v1.3.0")
    git(root, "switch", "--quiet", "--create", "work")
    (root / "CHANGELOG.md").write_text(
        CHANGELOG.replace("[Unreleased]\n", "[Unreleased]\n\n- A new thing.\n")
    )
    assert list(find_problems(root, "1.3.0")) == [
        "pyproject.toml has version 1.2.0: set it to 1.3.0",
        "the tree is not clean: commit or stash what `git status` shows",
        "the branch is work: switch to main",
        "the tag v1.3.0 exists: choose another version",
        "CHANGELOG.md has no section `## [1.3.0] - YYYY-MM-DD` with entries: write it",
        "CHANGELOG.md has entries under Unreleased: move them to the section of 1.3.0",
    ]
    assert main(["1.3.0"], root) == 1


def test_a_section_without_a_date_does_not_count(root: Path) -> None:
    (root / "CHANGELOG.md").write_text(CHANGELOG.replace("[1.2.0] - 2026-11-29", "[1.2.0]"))
    assert changelog_sections(root).keys() == {"Unreleased", "1.1.0"}


def test_a_dry_run_prints_the_steps_and_takes_none(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["1.2.0", "--dry-run"], root) == 0
    steps = capsys.readouterr().out.splitlines()
    assert steps[:2] == ["release: make check", "release: make test"]
    assert "hatchling build" in steps[-2]
    assert "git tag --annotate" in steps[-1]
    assert git(root, "tag", "--list") == ""
    assert git(root, "status", "--porcelain") == ""


def test_the_tag_carries_the_changelog_with_its_headings(root: Path) -> None:
    ReleaseSteps(root, "1.2.0", dry_run=False).tag()
    message = git(root, "tag", "--list", "--format=%(contents)", "v1.2.0")
    assert message == "Pathswitch 1.2.0\n\n### Added\n\n- A thing."
