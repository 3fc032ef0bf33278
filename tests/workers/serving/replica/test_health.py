"""When an engine counts as hung."""

from dataclasses import replace

import pytest

from workers.serving.engine.port import EngineStatus
from workers.serving.replica.health import unhealthy_reason


@pytest.mark.parametrize(
    ("longest_seconds", "hang_seconds", "allowed_seconds"),
    [
        (0.0, 25.0, 10.0),
        (0.9, 25.0, 10.0),
        (2.0, 25.0, 20.0),
        (60.0, 25.0, 25.0),
        (60.0, 90.0, 90.0),
        (0.1, 3.0, 3.0),
    ],
)
def test_an_engine_hangs_when_a_step_takes_much_longer_than_usual_or_than_the_limit(
    longest_seconds: float, hang_seconds: float, allowed_seconds: float
) -> None:
    status = EngineStatus(
        alive=True,
        stalled_seconds=allowed_seconds - 0.1,
        longest_step_seconds=longest_seconds,
        num_running=1,
        num_waiting=0,
        cached_tokens=0,
        cache_tokens=0,
    )
    assert unhealthy_reason(status, hang_seconds) is None
    assert unhealthy_reason(replace(status, stalled_seconds=allowed_seconds + 0.1), hang_seconds) is not None
