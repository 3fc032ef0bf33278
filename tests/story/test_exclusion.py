"""Data that should not have come in is excluded: the line becomes, to the bit, the one that never saw it."""

import pytest

from api.schemas.models import ModelVersion
from tests.story.conftest import NewPlane, Workers
from tests.support.control_plane import ControlPlane
from tests.support.story import DATASET, DOCUMENTS, SPEC, released
from tests.support.training import texts_of

pytestmark = pytest.mark.slow_on_postgres


def push(plane: ControlPlane, seed: int) -> None:
    plane.push(DATASET, *texts_of(seed, DOCUMENTS)).raise_for_status()


def measured(version: ModelVersion) -> list[float | None]:
    return [row.loss for row in version.evaluations]


def test_a_line_without_its_excluded_data_is_the_line_that_never_had_it(
    new_plane: NewPlane, workers: Workers
) -> None:
    with_it, without = new_plane(), new_plane()
    executor, serving = workers(with_it)
    with_it.client.create_model(SPEC)
    for seed in (1, 2, 3):
        push(with_it, seed)
        released(with_it, executor, serving, "m")
    with_it.client.exclude_version(DATASET, 2, "the wrong language")
    with_it.client.start_update("m")
    rewound = released(with_it, executor, serving, "m")
    assert rewound.number == 4

    executor, serving = workers(without)
    without.client.create_model(SPEC)
    for seed in (1, 3):
        push(without, seed)
        never = released(without, executor, serving, "m")
    assert rewound.artifact.sha256 == never.artifact.sha256
    assert measured(rewound) == measured(never)
