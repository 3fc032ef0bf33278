"""Three data versions of English prose that every installation already has: the docstrings of its libraries.

Version 1 is Python's standard library, version 2 NumPy and SQLAlchemy, version 3 PyTorch. They are similar
enough for one tokenizer, and different enough for an update to learn and to forget something. Sources are
parsed, never imported, so that building the corpus takes seconds and runs no foreign code.
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

# Enough for about fifty steps per version with a tiny model, and little enough that the demo takes minutes.
VERSION_BYTES = 400_000
# Shorter docstrings are mostly one-line labels ("Return self."), which teach only their own form.
MIN_CHARACTERS = 200

# Tests are not prose, and vendored copies would repeat one library's text in another.
SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__", "_numpy", "_vendor", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data",
        "site-packages", "test", "testing", "tests", "turtledemo",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Docstring:
    """One docstring. `id` is the qualified name of its object, `source` its file (`torch/hub.py`)."""

    id: str
    text: str
    source: str


@dataclass(frozen=True)
class DemoVersion:
    """One data version, with its docstrings in source order."""

    label: str
    documents: tuple[Docstring, ...]


@dataclass(frozen=True)
class _Library:
    """A folder of sources. `prefix` is the name of the package, empty for the standard library."""

    root: Path
    prefix: str


def demo_versions() -> list[DemoVersion]:
    """The three versions, of about VERSION_BYTES each. Deterministic; no text occurs twice."""
    seen: set[str] = set()
    return [
        _version("python", [_Library(Path(sysconfig.get_path("stdlib")), "")], seen),
        _version("numpy-sqlalchemy", [_package("numpy"), _package("sqlalchemy")], seen),
        _version("pytorch", [_package("torch")], seen),
    ]


def to_ndjson(version: DemoVersion) -> bytes:
    """The version as NDJSON, the body of an upload."""
    lines = (json.dumps(asdict(document), ensure_ascii=False) for document in version.documents)
    return "".join(f"{line}\n" for line in lines).encode()


def _package(name: str) -> _Library:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is a dependency of Pathswitch"
    assert spec.origin is not None
    return _Library(Path(spec.origin).parent, name)


def _version(label: str, libraries: list[_Library], seen: set[str]) -> DemoVersion:
    """Sample equally many bytes of each library. Adds the sampled texts to `seen`."""
    budget = VERSION_BYTES // len(libraries)
    return DemoVersion(label, tuple(d for library in libraries for d in _sample(library, budget, seen)))


def _sample(library: _Library, budget: int, seen: set[str]) -> list[Docstring]:
    """Sample docstrings of `library` up to `budget` bytes, in source order.

    Files are read in the order of the hash of their paths. This spreads the sample over the whole library,
    equally on every machine, without parsing all 2,000 files of torch to use 100.
    """
    sample: list[Docstring] = []
    names: set[str] = set()
    size = 0
    for path in sorted(
        _files(library.root), key=lambda path: _hash(path.relative_to(library.root).as_posix())
    ):
        for document in _documents(library, path):
            # Compare bodies without their headings, because inherited docstrings differ only in the heading.
            body = document.text.partition("\n\n")[2]
            if body in seen or document.id in names:
                continue
            seen.add(body)
            names.add(document.id)
            sample.append(document)
            size += len(document.text.encode())
            if size >= budget:
                # The sort is stable, and within a file the documents are in source order already.
                return sorted(sample, key=lambda document: document.source)
    return sorted(sample, key=lambda document: document.source)


def _files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            yield path


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _documents(library: _Library, path: Path) -> Iterator[Docstring]:
    """The docstrings of one file that are long enough and plain text, in source order."""
    relative = path.relative_to(library.root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other libraries are not ours to report
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
    """Names and raw docstrings of `node` and of everything that it defines, also under `if` and `try`."""
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
    """Whether the text has no lone surrogates or control characters, as some docstrings do by accident."""
    return all(character.isprintable() or character in "\n\t" for character in body)


def write(folder: Path) -> None:
    """Write the versions as `pathswitch study` reads them: ``train/v1.ndjson`` and so on."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for number, version in enumerate(demo_versions(), 1):
        (folder / "train" / f"v{number}.ndjson").write_bytes(to_ndjson(version))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
