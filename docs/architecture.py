"""Write the generated parts of docs/architecture.md: the state diagrams, and every file with its docstring's first line.

python docs/architecture.py            # or: make docs
python docs/architecture.py --check    # exit status 1 if the page is stale
"""

import ast
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

from service.core.states import MOVES, ModelVersionState, ReleaseState, StageState, UpdateState

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
DIAGRAMS: dict[str, type[StrEnum]] = {
    "updates": UpdateState,
    "stages": StageState,
    "model-versions": ModelVersionState,
    "releases": ReleaseState,
}
WIDTH = 100


def state_diagram(states: type[StrEnum]) -> str:
    """A Mermaid diagram of the legal moves. The first declared state is the initial one."""
    moves = MOVES[states]
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {next(iter(states))}"]
    for source in states:
        lines += [f"    {source} --> {target}" for target in states if target in moves[source]]
        if not moves[source]:
            lines.append(f"    {source} --> [*]")
    return "\n".join([*lines, "```"])


def file_list() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    return "\n".join(line for package in packages for line in _folder(ROOT / package))


def _folder(folder: Path) -> Iterator[str]:
    """A heading with the package's own docstring, its modules, then its folders."""
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.py")))
    package = folder / "__init__.py"
    about = first_line(package) if package.exists() and package.stat().st_size else ""
    if files or about:
        yield from (f"### `{folder.relative_to(ROOT).as_posix()}/`", "")
        if about:
            yield from (*textwrap.wrap(about, WIDTH, break_on_hyphens=False), "")
        for path in files:
            text = f"- `{path.name}`: {first_line(path)}"
            yield from textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        if files:
            yield ""
    for inner in folders:
        yield from _folder(inner)


def first_line(path: Path) -> str:
    """The first line of a module's docstring, or its first sentence where that is longer."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if docstring is None:
        raise SystemExit(f"{path.relative_to(ROOT)} has no docstring: say in one line what the module does")
    line = docstring.partition("\n")[0]
    if not line.endswith((".", ":")):
        line = " ".join(docstring.partition("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."
    return line.replace("``", "`")


def replaced(page: str, name: str, content: str) -> str:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{PAGE} has no marks '{begin}' and '{end}'")
    return f"{before}{begin}\n{content.strip()}\n{end}{after}"


def main() -> None:
    page = old = PAGE.read_text()
    for name, states in DIAGRAMS.items():
        page = replaced(page, name, state_diagram(states))
    page = replaced(page, "files", file_list())
    if "--check" in sys.argv[1:]:
        if page != old:
            raise SystemExit("docs/architecture.md is stale: run `make docs`")
    else:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
