from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from service.artifacts import Artifacts, LocalArtifacts
from tests.support.tiny_export import publish_tiny_export, write_tiny_export
from tests.workers.serving.scripted_engines import ScriptedLoader
from tests.workers.serving.serving_line import LINE, UNRELEASED, settle
from workers.serving.local_serving import LocalServing


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model version."""
    folder = tmp_path_factory.mktemp("export")
    write_tiny_export(folder, seed=1)
    return folder


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    artifacts = LocalArtifacts(tmp_path_factory.mktemp("artifacts"))
    for number in (1, 2, 3):
        publish_tiny_export(artifacts, f"export/{number}", seed=number)
    publish_tiny_export(artifacts, "export/broken", seed=4, broken=True)
    return artifacts


@pytest.fixture
def loader() -> ScriptedLoader:
    return ScriptedLoader()


@pytest.fixture(scope="session")
def serving(artifacts: Artifacts) -> Iterator[LocalServing]:
    serving = LocalServing(artifacts, "127.0.0.1", 0)
    settle(serving, LINE, UNRELEASED)
    yield serving
    serving.close()


@pytest.fixture(scope="session")
def client(serving: LocalServing) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{serving.url()}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def http(serving: LocalServing) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=serving.url(), timeout=30) as http:
        yield http
