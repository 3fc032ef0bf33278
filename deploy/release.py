"""Release a version: check the tree, run the tests, build wheel and sdist into dist/, and make the annotated tag.

    .venv/bin/python deploy/release.py 0.2.0 --dry-run
    .venv/bin/python deploy/release.py 0.2.0

Set the version in pyproject.toml and write its section in CHANGELOG.md first, on main. Pushing is left to you.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description="Release a version of Pathswitch.")
    parser.add_argument("version", help="as in pyproject.toml, e.g. 0.2.0")
    parser.add_argument(
        "--dry-run", action="store_true", help="check, and print the steps without taking them"
    )
    options = parser.parse_args(arguments)
    problems = list(find_problems(root, options.version))
    for problem in problems:
        say(f"not ready: {problem}")
    if problems and not options.dry_run:
        return 1
    steps = ReleaseSteps(root, options.version, dry_run=options.dry_run)
    steps.run("make", "check")
    steps.run("make", "test")
    steps.build()
    steps.tag()
    if not options.dry_run:
        say(f"released {options.version}: push it with `git push --follow-tags`")
    return 1 if problems else 0


def find_problems(root: Path, version: str) -> Iterator[str]:
    """Everything that keeps this tree from being released under that version."""
    declared = project(root)["project"]["version"]
    if declared != version:
        yield f"pyproject.toml has version {declared}: set it to {version}"
    if git(root, "status", "--porcelain"):
        yield "the tree is not clean: commit or stash what `git status` shows"
    branch = git(root, "branch", "--show-current")
    if branch != "main":
        yield f"the branch is {branch or 'detached'}: switch to main"
    if git(root, "tag", "--list", tag_name(version)):
        yield f"the tag {tag_name(version)} exists: choose another version"
    sections = changelog_sections(root)
    if not sections.get(version):
        yield f"CHANGELOG.md has no section `## [{version}] - YYYY-MM-DD` with entries: write it"
    if sections.get("Unreleased"):
        yield f"CHANGELOG.md has entries under Unreleased: move them to the section of {version}"


class ReleaseSteps:
    """The steps. A dry run only prints them."""

    def __init__(self, root: Path, version: str, *, dry_run: bool) -> None:
        self._root = root
        self._version = version
        self._dry_run = dry_run

    def run(self, *command: str, **environment: str) -> None:
        say(shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command]))
        if not self._dry_run:
            subprocess.run(command, cwd=self._root, env=os.environ | environment, check=True)

    def build(self) -> None:
        """With the build backend in an environment of its own: the lock does not contain it."""
        requirements = project(self._root)["build-system"]["requires"]
        commit_time = git(self._root, "log", "-1", "--format=%ct")
        with tempfile.TemporaryDirectory() as folder:
            python = f"{folder}/bin/python"
            self.run(sys.executable, "-m", "venv", folder)
            self.run(python, "-m", "pip", "install", "--quiet", *requirements)
            targets = ("--target", "sdist", "--target", "wheel")
            # The same commit gives the same bytes.
            self.run(
                python,
                "-m",
                "hatchling",
                "build",
                "--clean",
                *targets,
                "--directory",
                "dist",
                SOURCE_DATE_EPOCH=commit_time,
            )
        for name in distribution_names(self._version):
            path = self._root / "dist" / name
            if not self._dry_run and not path.exists():
                raise SystemExit(f"the build did not write dist/{name}")

    def tag(self) -> None:
        """Its message is the changelog's section, in which lines that begin with # are headings, not comments."""
        message = f"Pathswitch {self._version}\n\n{changelog_sections(self._root).get(self._version, '')}\n"
        name = tag_name(self._version)
        command = ["git", "tag", "--annotate", "--cleanup=whitespace", "--file=-", name]
        say(f"{shlex.join(command)}  # with the changelog's section")
        if not self._dry_run:
            subprocess.run(command, cwd=self._root, input=message, text=True, check=True)


def changelog_sections(root: Path) -> dict[str, str]:
    """The text under each `## [version]` heading, by version. A version needs a date, `Unreleased` has none."""
    parts = re.split(r"^## \[(.+?)\](.*)$", (root / "CHANGELOG.md").read_text(), flags=re.M)
    return {
        version: text.strip()
        for version, date, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
        if version == "Unreleased" or re.fullmatch(r" - \d{4}-\d{2}-\d{2}", date)
    }


def distribution_names(version: str) -> tuple[str, str]:
    return f"pathswitch-{version}.tar.gz", f"pathswitch-{version}-py3-none-any.whl"


def tag_name(version: str) -> str:
    return f"v{version}"


def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def git(root: Path, *arguments: str) -> str:
    ran = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def say(text: str) -> None:
    sys.stdout.write(f"release: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
