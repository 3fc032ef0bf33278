"""Names that a Ray cluster started under 0.2 still looks up after an upgrade in place."""

import pickle
from pathlib import Path

import pytest

from service.artifacts import Artifacts, LocalArtifacts


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("workers.ray_executor", "StageHost"),  # the class of a detached actor, stored by reference
        ("workers.run_board", "RunBoard"),  # the same
        ("workers.run_board", "board"),  # globals of the function that 0.2's driver sends to its ranks
        ("workers.failures", "describe_failure"),
        ("service.artifacts", "Artifacts"),
        ("service.core.executor", "Run"),
        ("service.core.executor", "RunReport"),
        ("service.core.executor", "Point"),
        ("workers.stages", "run_stage"),  # what that function imports
        ("workers.stages.context", "StageContext"),
        ("workers.ray_job", "main"),  # the entry point of 0.2's jobs
    ],
)
def test_an_object_that_0_2_names_still_loads(module: str, name: str) -> None:
    assert pickle.loads(f"c{module}\n{name}\n.".encode()).__name__ == name


def test_ranks_of_a_job_that_0_2_started_can_open_the_artifacts(tmp_path: Path) -> None:
    url = LocalArtifacts(tmp_path).url
    assert Artifacts.from_url(url).url == url
