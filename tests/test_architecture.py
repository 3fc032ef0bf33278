"""The source tree follows docs/architecture.md: the folders are the packages, and the import contracts hold."""

import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = frozenset({"service", "workers", "api", "migrations", "deploy"})


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*sorted(PACKAGES), include_external_packages=True, cache_dir=None)


def test_the_import_contracts_hold() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run(
        [lint_imports, "--no-logo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_core_imports_the_standard_library_and_pydantic_only(graph: grimp.ImportGraph) -> None:
    """Stricter than the import contract, which can only list forbidden packages."""
    core = {"service.core", *graph.find_descendants("service.core")}
    roots = {imported.partition(".")[0] for module in core for imported in _imports(graph, module) - core}
    assert roots - sys.stdlib_module_names <= {"pydantic", "pydantic_core"}


def test_workers_import_only_core_artifacts_and_documents_from_service(graph: grimp.ImportGraph) -> None:
    imports = {
        imported
        for module in {"workers", *graph.find_descendants("workers")}
        for imported in _imports(graph, module)
        if imported.partition(".")[0] == "service"
    }
    allowed = {
        "service.core",
        *graph.find_descendants("service.core"),
        "service.artifacts",
        "service.ingest.reading",
    }
    assert imports <= allowed


def test_only_the_packages_tests_and_docs_contain_python_files() -> None:
    folders = {
        path.name
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and next(path.rglob("*.py"), None)
    }
    assert folders - {"build", "dist"} == PACKAGES | {"tests", "docs"}


def test_the_wheel_has_every_package_and_nothing_else() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == PACKAGES
    assert set(project["tool"]["importlinter"]["root_packages"]) == PACKAGES


def test_every_folder_with_modules_is_a_regular_package() -> None:
    """Neither the import contracts nor mypy see a namespace package."""
    missing = {
        str(module.parent.relative_to(ROOT))
        for package in PACKAGES
        for module in (ROOT / package).rglob("*.py")
        if not (module.parent / "__init__.py").exists()
    }
    assert not missing


def _imports(graph: grimp.ImportGraph, module: str) -> set[str]:
    return graph.find_modules_directly_imported_by(module)


def test_xdist_keeps_the_tests_of_a_file_in_one_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist appends the group to the node id; without it, fixtures are built twice and two Rays start."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("runs in the processes of `make test` only")
    assert request.node.nodeid.endswith(f"@{request.path.as_posix()}")
