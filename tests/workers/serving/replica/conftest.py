from collections.abc import Iterator

import pytest

from service.artifacts import Artifacts
from tests.workers.serving.scripted_engines import ScriptedLoader
from workers.serving.replica.replica import Replica


@pytest.fixture
def replica(artifacts: Artifacts, loader: ScriptedLoader) -> Iterator[Replica]:
    replica = Replica("replica-0", artifacts.open, loader)
    yield replica
    replica.pool.close()
