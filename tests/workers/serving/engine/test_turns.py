"""When those who are refused are told to come back."""

import pytest

from workers.serving.engine import turns
from workers.serving.engine.turns import MAX_QUEUED_SECONDS, Turns


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    return clock


@pytest.fixture
def ten_a_second(clock: Clock) -> Turns:
    made = Turns()
    for _ in range(100):
        made.begin()
        clock.now += 0.1
        made.sequence_ended()
        made.end()
    return made


def test_before_anything_has_ended_a_second(clock: Clock) -> None:
    assert Turns().retry_seconds(16) == 1.0


def test_half_of_what_waits_has_its_turn_first_and_then_one_after_another(ten_a_second: Turns) -> None:
    assert [ten_a_second.retry_seconds(16) for _ in range(3)] == pytest.approx([0.8, 0.9, 1.0], rel=0.05)


def test_when_they_should_have_come_back_nobody_is_before_the_next(ten_a_second: Turns, clock: Clock) -> None:
    for _ in range(20):
        ten_a_second.retry_seconds(16)
    clock.now += 10
    assert ten_a_second.retry_seconds(16) == pytest.approx(0.8, rel=0.05)


def test_those_who_come_back_too_early_do_not_push_it_out_of_sight(ten_a_second: Turns) -> None:
    assert max(ten_a_second.retry_seconds(16) for _ in range(1000)) == MAX_QUEUED_SECONDS
    assert ten_a_second.retry_seconds(200) == pytest.approx(10, rel=0.05)
