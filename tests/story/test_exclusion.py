"""After an exclusion the line is bit for bit the one that never read the excluded data."""

import pytest

from api.schemas.models import ModelVersion
from tests.story.conftest import NewPlane, Workers
from tests.support.control_plane import ControlPlane
from tests.support.story import DATASET, DOCUMENTS, SPEC, released
from tests.support.training import texts_of

pytestmark = pytest.mark.slow_on_postgres


def push(plane: ControlPlane, seed: int) -> None:
    plane.push(DATASET, *texts_of(seed, DOCUMENTS)).raise_for_status()


def losses(version: ModelVersion) -> list[float | None]:
    return [row.loss for row in version.evaluations]


def test_a_line_with_excluded_data_equals_a_line_that_never_had_it(
    new_plane: NewPlane, workers: Workers
) -> None:
    rewinding, clean = new_plane(), new_plane()
    executor, serving = workers(rewinding)
    rewinding.client.create_model(SPEC)
    for seed in (1, 2, 3):
        push(rewinding, seed)
        released(rewinding, executor, serving, "m")
    rewinding.client.exclude_version(DATASET, 2, "the wrong language")
    rewinding.client.start_update("m")
    rewound = released(rewinding, executor, serving, "m")
    assert rewound.number == 4

    executor, serving = workers(clean)
    clean.client.create_model(SPEC)
    without_it = []
    for seed in (1, 3):
        push(clean, seed)
        without_it.append(released(clean, executor, serving, "m"))
    assert rewound.artifact.sha256 == without_it[-1].artifact.sha256
    assert losses(rewound) == losses(without_it[-1])
