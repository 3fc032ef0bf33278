"""A line with artifacts damaged on disk continues to the same bits as an undamaged one."""

import pytest

from service.core.stage_specs import StageKind
from tests.story.conftest import NewPlane, Workers
from tests.support.control_plane import ControlPlane
from tests.support.story import SPEC, push_and_release


def keys_of(plane: ControlPlane, kind: StageKind) -> list[str]:
    return plane.artifacts.keys({StageKind.PACK: "pack", StageKind.TOKENIZER: "tokenizer"}[kind])


@pytest.mark.slow_on_postgres
@pytest.mark.parametrize("kind", [StageKind.PACK, StageKind.TOKENIZER])
def test_damaged_artifacts_are_detected_rebuilt_and_reported(
    new_plane: NewPlane, workers: Workers, kind: StageKind
) -> None:
    whole, damaged = new_plane(), new_plane()
    for plane in (whole, damaged):
        plane.client.create_model(SPEC)
    executor, serving = workers(whole)
    expected = [push_and_release(whole, number, executor, serving) for number in (1, 2)]

    executor, serving = workers(damaged)
    push_and_release(damaged, 1, executor, serving)
    [key] = keys_of(damaged, kind)
    largest = max(damaged.artifacts.open(key).iterdir(), key=lambda path: path.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 1
    largest.write_bytes(raw)
    second = push_and_release(damaged, 2, executor, serving)
    assert second.artifact.sha256 == expected[1].artifact.sha256
    assert second.evaluations == expected[1].evaluations
    damaged.artifacts.open(key)
    rebuilt = [event.data for event in damaged.client.events() if event.type == "stage.made_again"]
    [_, update] = damaged.client.updates("m")
    assert [event["update"] for event in rebuilt] == [update.id]
