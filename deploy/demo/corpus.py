"""Three data versions of real English prose that every installation already has: its libraries' docstrings.

The three are close enough for one tokenizer and far enough apart for an update to learn something and to
forget something: Python's standard library, then NumPy and SQLAlchemy, then PyTorch. Sources are parsed and
never imported, so that building the corpus takes seconds and runs nothing.
"""

import ast
import hashlib
import importlib.util
import inspect
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# Enough that a tiny model trains for some fifty steps a version, little enough that the demo ends in minutes.
VERSION_BYTES = 400_000
# Shorter docstrings are mostly one-line labels ("Return self."), which teach little but their own form.
MIN_CHARACTERS = 200

# Tests are not prose, and vendored copies would put one library's text into another's.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "_numpy", "_vendor", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
        "site-packages", "test", "testing", "tests", "turtledemo",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Docstring:
    """One docstring: `id` is the qualified name of what it documents, `source` its file (`torch/hub.py`)."""

    id: str
    text: str
    source: str


@dataclass(frozen=True)
class DemoVersion:
    """The documents of one data version, in source order."""

    label: str
    documents: tuple[Docstring, ...]


@dataclass(frozen=True)
class _Library:
    """A tree of sources. `prefix` is the package's own name, empty for the standard library."""

    root: Path
    prefix: str


def demo_versions() -> list[DemoVersion]:
    """The three versions, about VERSION_BYTES of UTF-8 each; equal on every call, no text twice."""
    seen: set[str] = set()
    return [
        _version("python", [_Library(Path(sysconfig.get_path("stdlib")), "")], seen),
        _version("numpy-sqlalchemy", [_package("numpy"), _package("sqlalchemy")], seen),
        _version("pytorch", [_package("torch")], seen),
    ]


def to_ndjson(version: DemoVersion) -> bytes:
    """The version as the body of a POST: one JSON object a line."""
    lines = (json.dumps(asdict(document), ensure_ascii=False) for document in version.documents)
    return "".join(f"{line}\n" for line in lines).encode()


def _package(name: str) -> _Library:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is a dependency of this project"
    assert spec.origin is not None
    return _Library(Path(spec.origin).parent, name)


def _version(label: str, libraries: list[_Library], seen: set[str]) -> DemoVersion:
    """An equal share of every library. Adds to `seen` the texts that were taken."""
    budget = VERSION_BYTES // len(libraries)
    return DemoVersion(label, tuple(d for library in libraries for d in _sample(library, budget, seen)))


def _sample(library: _Library, budget: int, seen: set[str]) -> list[Docstring]:
    """Documents of `library` up to `budget` bytes.

    Files are read in the order of the hash of their path: a spread over the whole library that is the same
    everywhere, without parsing the 2,000 files of torch to use 100. What was taken goes back in source order.
    """
    taken: list[Docstring] = []
    names: set[str] = set()
    size = 0
    for path in sorted(
        _files(library.root), key=lambda path: _hash(path.relative_to(library.root).as_posix())
    ):
        for document in _documents(library, path):
            # The body is compared without its heading: an inherited docstring is a copy under another name.
            body = document.text.partition("\n\n")[2]
            if body in seen or document.id in names:
                continue
            seen.add(body)
            names.add(document.id)
            taken.append(document)
            size += len(document.text.encode())
            if size >= budget:
                # Stable: within a file the documents are in source order already.
                return sorted(taken, key=lambda document: document.source)
    return sorted(taken, key=lambda document: document.source)


def _files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield path


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _documents(library: _Library, path: Path) -> Iterator[Docstring]:
    """The docstrings of one file that are worth training on, in source order."""
    relative = path.relative_to(library.root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another library's invalid escapes are not ours to report
        tree = ast.parse(path.read_bytes())
    parts = [library.prefix] if library.prefix else []
    parts += relative.with_suffix("").parts
    module = ".".join(part for part in parts if part != "__init__")
    source = Path(library.prefix or "python", relative).as_posix()
    for name, docstring in _docstrings(tree, module):
        body = inspect.cleandoc(docstring).strip()
        if len(body) >= MIN_CHARACTERS and _is_text(body):
            yield Docstring(name, f"{name}\n\n{body}", source)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Qualified name and raw docstring of `node` and of what it defines, also under `if` and `try`."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring is not None:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _docstrings(child, name)


def _is_text(body: str) -> bool:
    """No lone surrogates or control characters: escapes that a few docstrings evaluate by accident."""
    return all(character.isprintable() or character in "\n\t" for character in body)


def write(folder: Path) -> None:
    """The versions as `pathswitch study` reads them: ``train/v1.ndjson`` and so on."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for number, version in enumerate(demo_versions(), 1):
        (folder / "train" / f"v{number}.ndjson").write_bytes(to_ndjson(version))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
